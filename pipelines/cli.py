"""The command `rayograph STAGE [key=value …]`."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

STAGES = {
    "ingest": "read, decode, normalise and split images; refuse the bad ones",
    "autoencoder": "train (or fetch) the image autoencoder",
    "encoder": "train (or fetch) the DINO image encoder",
    "latents": "encode all images once: latents and embeddings",
    "train": "train the denoiser over latents, conditioned on embeddings",
    "sample": "make a synthetic corpus",
    "evaluate": "fidelity, diversity and memorisation, each beside its real-to-real floor",
    "finetune": "a classifier from real, synthetic and both",
    "report": "one HTML page with pictures, curves and tables",
    "publish": "a generator and a corpus that stand alone, with their cards",
}

USAGE = """\
rayograph: from unlabelled chest X-rays to a published generator and a synthetic corpus

  rayograph run   [key=value …]   the whole path, each stage only where its work is not yet done
  rayograph STAGE [key=value …]   one stage:

{stages}

Settings most used
  profile=demo                    the size of everything (rayograph run --help lists the choices)
  data=phantom | folder           with data.root=PATH: [train|val|test/][class/]image
  storage=DIR name=NAME           results are left in DIR/NAME/STAGE
  seed=0
Any setting: rayograph STAGE --help; as YAML: rayograph STAGE --cfg job

Examples
  rayograph run
  rayograph run data=folder data.root=xrays storage=runs name=first
  rayograph train trainer.workers=2 trainer.zero_stage=3
"""


def main() -> None:
    """Entry point.  Exit codes: 0 done, 1 a failure, 2 the user's mistake (one line says what and where)."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE.format(stages="\n".join(f"  {name:<12} {text}" for name, text in STAGES.items())))
        sys.exit(0)
    if arguments[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"rayograph {version('rayograph')}")
        sys.exit(0)
    command, *overrides = arguments
    if command != "run" and command not in STAGES:
        sys.exit(mistake(f"{command!r} is no stage; known are: run, {', '.join(STAGES)}"))
    sys.exit(_hydra(command, overrides))


def mistake(message: str) -> int:
    """Tell the user, on one line, what to mend; returns the exit code."""
    lines = (line.strip() for line in message.splitlines())
    print("rayograph:", "; ".join(line for line in lines if line), file=sys.stderr)
    return 2


def _hydra(command: str, overrides: list[str]) -> int:
    """Let Hydra compose the settings and call the command with them (several times under --multirun)."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from pipelines.compose import register_schema

    register_schema()
    codes: list[int] = []

    def task(config: Any) -> None:
        codes.append(_execute(command, config))

    sys.argv = [f"rayograph {command}", *overrides]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors instead of printing them
    try:
        hydra.main(version_base="1.3", config_path="pkg://pipelines.conf", config_name="config")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        message, _, _ = str(error).partition("Config search path")
        return mistake(f"{message}\n{error.__cause__ or ''}")
    except SystemExit as stop:  # argparse has printed what is wrong with the command line
        return int(stop.code or 0)
    return max(codes, default=0)


def _execute(command: str, config: Any) -> int:
    """Run one command under one configuration; returns the exit code."""
    from pipelines.compose import to_settings

    try:
        settings = to_settings(config)
        from pipelines import run

        if settings.report and command != "latents":
            raise ValueError(f"report=true is of rayograph latents; {command} has none")
        if command == "run":
            worked = run.run_all(settings)
            from pipelines.evaluate.metrics import summary

            print(summary(settings))
            if not worked:
                print("nothing to do: every stage was done before with these settings")
        else:
            run.run_stages(settings, [command], redo=settings.changed == "redo")
            if settings.report:
                from pipelines.evaluate.latents_report import latents_report
                from pipelines.stage import run_folder

                print(latents_report(run_folder(settings)))
        return 0
    except ValueError as error:
        return mistake(str(error))
    except FloatingPointError as error:  # a training that came apart: the user's to mend, but no mistake in the command
        mistake(str(error))
        return 1
    except KeyboardInterrupt:
        print("rayograph: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    main()
