"""Launchers on other machines over OpenSSH: the hosts, the command for each, and the processes here."""
