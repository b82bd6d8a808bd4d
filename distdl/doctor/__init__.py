"""`distdl doctor`: what is wrong with a machine, or with the processes of a job, before a run finds out.

    collect/    effects: reads the machine, as `Facts` of one process
    meeting     effects: the processes of a job hand their facts to rank 0
    checks/     pure: the facts of all processes -> findings
    report      findings -> lines, JSON, an exit code

A new check is a function in checks/, and a field of `Facts` where it needs to know more.
"""
