"""The command `rayograph STAGE [key=value …]`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from pipelines.graph.declared import stage_registry

USAGE = """\
rayograph: from unlabelled chest X-rays to a published generator and a synthetic corpus

  rayograph run   [key=value …]   all stages in order, skipping those that are up to date
  rayograph STAGE [key=value …]   one stage (or one node of the graph, by its name):

{stages}

Settings most used
  profile=demo                    size of everything
  data=phantom | folder | …       with data.root=PATH: [train|val|test/][class/]image
  graph=path | arms               each stage once, or several corpora side by side
  storage=DIR name=NAME           results are written to DIR/NAME/STAGE
  seed=0
A stage's own settings, each with a sentence: rayograph STAGE --help; all as YAML: rayograph run --cfg job

Examples
  rayograph run
  rayograph run data=folder data.root=xrays storage=runs name=first
  rayograph train trainer.workers=2 trainer.zero_stage=3
"""


def main() -> None:
    """Entry point.  Exit codes: 0 done, 1 a failure, 2 the user's mistake (one line says what and where)."""
    arguments = sys.argv[1:]
    stages = stage_registry()["stages"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(stages="\n".join(f"  {name:<12} {stage['help']}" for name, stage in stages.items())))
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rayograph {version('rayograph')}")
        sys.exit(0)
    command, *overrides = arguments
    if command not in ("run", *stages) and not any(one.startswith("graph") for one in overrides):
        import difflib

        close = difflib.get_close_matches(command, ["run", *stages], 1)
        sys.exit(mistake(f"unknown stage {command!r}; "
                         + (f"did you mean {close[0]!r}?" if close else f"there are: run, {', '.join(stages)}")))
    sys.exit(_hydra(command, overrides))


def mistake(message: str) -> int:
    """Print a user error on one line; returns the exit code."""
    lines = (line.strip() for line in message.splitlines())
    print("rayograph:", "; ".join(line for line in lines if line), file=sys.stderr)
    return 2


def _hydra(command: str, overrides: list[str]) -> int:
    """Compose the settings with Hydra and call the command with them (several times under --multirun)."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cluster.errors import UserError
    from pipelines.graph.compose import register_schema
    from pipelines.graph.overrides import check_overrides

    register_schema()
    codes: list[int] = []
    written: set[str] = set()  # folders of the runs of this command
    wants_help = not {"-h", "--help"}.isdisjoint(overrides)

    def task(config: Any) -> None:
        if wants_help:
            from pipelines.graph.help import stage_help

            try:
                print(stage_help(command, config))
            except UserError as error:
                codes.append(mistake(str(error)))
            return
        codes.append(_execute(command, config, written))

    sys.argv = [f"rayograph {command}", *(one for one in overrides if one not in ("-h", "--help"))]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        check_overrides(overrides)
        hydra.main(version_base="1.3", config_path="pkg://pipelines.conf", config_name="config")(task)()
    except UserError as error:
        return mistake(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        message, _, _ = str(error).partition("Config search path")
        return mistake(f"{message}\n{error.__cause__ or ''}")
    except SystemExit as stop:  # argparse has printed what is wrong with the command line
        return int(stop.code or 0)
    return max(codes, default=0)


def _execute(command: str, config: Any, written: set[str]) -> int:
    """Run one command under one configuration, into a folder that is not yet `written`; returns the exit code."""
    from cluster.errors import UserError
    from cluster.faults import StorageUnavailable
    from pipelines.graph import compose, run
    from pipelines.graph.stage import run_folder

    try:
        settings = compose.to_settings(config)
        folder = run_folder(settings)
        if folder.uri in written:
            raise UserError(f"--multirun would write {folder.uri} twice; put what differs into its name, as in "
                            "name='lr-${trainer.lr}'")
        written.add(folder.uri)
        if settings.report and command != "latents":
            raise UserError("report=true applies only to `rayograph latents`")
        if command == "run":
            worked = run.run_all(settings)
            from pipelines.report.summary import summary, write_metrics

            write_metrics(settings)
            print(summary(settings))
            if not worked:
                print("nothing to do: all stages are up to date")
            return 0
        nodes = [command] if command in settings.graph else settings.nodes(command)
        if not nodes:
            raise UserError(f"the graph has no node {command!r}; it has {', '.join(settings.graph)}")
        run.run_stages(settings, nodes, redo=settings.changed == "redo")
        if settings.report:
            from pipelines.generator.latents.report import latents_report

            print(latents_report(folder))
        return 0
    except UserError as error:
        return mistake(str(error))
    except (FloatingPointError, StorageUnavailable) as error:  # for the user to fix, but not an error in the command
        mistake(str(error))
        return 1
    except KeyboardInterrupt:
        print("rayograph: interrupted; the same command resumes from here", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
