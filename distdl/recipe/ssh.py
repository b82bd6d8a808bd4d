"""How a run is started on other machines over ssh: the keys of `launch.ssh`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from distdl.recipe.base import Section, Text, problem

Words = Annotated[tuple[Text, ...], Field(strict=False)]


class Ssh(Section):
    """What `--on ssh` needs to know of the hosts. What is null is as on the machine that starts them."""

    hostfile: Text | None = Field(None, description="File of hosts, lines such as node01 slots=8.")
    python: Text | None = Field(None, description="Python on the hosts. Null: the path of this one.")
    directory: Text | None = Field(
        None, description="Working directory on the hosts. Null: the path of this one."
    )
    pass_env: Words = Field(
        ("NCCL_*", "GLOO_*", "DISTDL_*"), description="Environment variables that the hosts get from here."
    )
    env: dict[Text, str] = Field({}, description="Further environment variables.")
    client: Words = Field(
        ("ssh",), description='The ssh command with its options, such as [ssh, -p, "2222"].'
    )

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        for name, value in env.items():
            if "=" in name or "\0" in name + value:
                raise problem(f"{name!r}: expected a name without =, and no NUL in it or its value")
        return env

    @field_validator("client")
    @classmethod
    def _command(cls, client: tuple[str, ...]) -> tuple[str, ...]:
        if not client:
            raise problem("expected at least one word, the command")
        return client
