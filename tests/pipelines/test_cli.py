import subprocess
import sys

import pytest
import yaml

from pipelines import cli
from pipelines.graph.compose import load_settings
from pipelines.graph.declared import stage_registry


@pytest.fixture
def rayograph(tmp_path, monkeypatch, capfd):
    """Run the command in this process, in an empty folder: exit code, output, lines of error."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, list[str]]:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["rayograph", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        return stop.value.code or 0, out, err.splitlines()

    yield call
    HydraConfig.instance().cfg = None  # which other tests of this process would take for theirs


@pytest.fixture
def no_ray(monkeypatch):
    import cluster.session

    def started():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster.session, "session", started)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_stage(rayograph, arguments):
    code, out, err = rayograph(*arguments)
    assert (code, err) == (0, [])
    for stage in ("run", *stage_registry()["stages"]):
        assert stage in out


def test_the_stages_of_the_command_are_those_of_the_graph():
    assert list(stage_registry()["stages"]) == list(load_settings().graph)


@pytest.mark.parametrize("argument", ["--help", "--version", "nosuchstage"])
def test_what_needs_no_settings_loads_nothing_heavy(argument):
    code = ("import sys; from pipelines.cli import main; sys.argv = ['rayograph', sys.argv[1]]\n"
            "try: main()\nexcept SystemExit: pass\n"
            "heavy = {'hydra', 'omegaconf', 'torch', 'ray', 'pyarrow', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code, argument], check=True, capture_output=True)


@pytest.mark.parametrize("stage", ["ingest", "train"])
def test_composing_settings_loads_neither_torch_nor_ray(stage):
    code = ("import sys; from pipelines.cli import main; sys.argv = ['rayograph', sys.argv[1], '--cfg', 'job']\n"
            "try: main()\nexcept SystemExit: pass\n"
            "heavy = {'torch', 'ray', 'diffusers', 'pyarrow'} & set(sys.modules)\n"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code, stage], check=True, capture_output=True)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("culprit", "arguments"), [
    ("trian", ["trian"]),
    ("foo", ["ingest", "foo=1"]),
    ("data.foo", ["ingest", "data.foo=1"]),
    ("trainer.images", ["train", "trainer.images=abc"]),
    ("data.deduplicate", ["ingest", "data.deduplicate=maybe"]),
    ("data=nosuch", ["ingest", "data=nosuch"]),
    ("profile=nosuch", ["run", "profile=nosuch"]),
    ("seed", ["ingest", "seed"]),
    ("[1", ["ingest", "autoencoder.channels=[1"]),
    ("sample.steps=-1", ["sample", "sample.steps=-1"]),
    ("trainer.lr", ["train", "trainer.lr=nan"]),
    ("data.size", ["ingest", "data.size=63"]),
    ("data.patient_regex", ["ingest", "data.patient_regex='('"]),
    ("data.val_fraction", ["ingest", "data.val_fraction=0.6", "data.test_fraction=0.4"]),
    ("trainer.workers", ["train", "trainer.workers=200"]),
    ("trainer.schedule", ["train", "trainer.schedule=linear"]),
    ("trainer.ema_length", ["train", "trainer.ema_length=0.3"]),
    ("denoiser.pretrained", ["train", "denoiser.pretrained=unet", "objective.process=edm"]),
    ("denoiser.pretrained", ["train", "denoiser=stable-diffusion", "autoencoder.space=pixel"]),
    ("trainer.precision", ["train", "trainer.precision=fp16", "trainer.zero_stage=0"]),
    ("trainer.min_workers", ["train", "trainer.min_workers=2"]),
    ("trainer.micro_batch", ["train", "trainer.micro_batch=1"]),
    ("trainer.loggers", ["train", "trainer.loggers=[paper]"]),
    ("validate.images", ["train", "trainer.select_by=val_loss", "validate.images=0"]),
    ("validate.frechet_images", ["train", "trainer.select_by=val_frechet"]),
    ("latents.patch_grid", ["train", "condition.patches=true"]),
    ("latents.masks", ["train", "condition.mask=true"]),
    ("denoiser.width", ["train", "denoiser=dit-s", "denoiser.head_dim=50"]),
    ("autoencoder.space", ["autoencoder", "autoencoder.space=pixels"]),
    ("changed", ["run", "changed=maybe"]),
    ("name", ["ingest", "name=../x"]),
    ("name", ["ingest", "name="]),
    ("name", ["ingest", "name=.."]),
    ("name=", ["ingest", "name=???"]),
    ("nosuch", ["ingest", "seed=${nosuch}"]),
    ("data.root", ["ingest", "data=folder"]),
    ("data.root", ["run", "data=folder"]),
    ("data.root", ["ingest", "data=folder", "data.root="]),
    ("/no/where", ["run", "data=folder", "data.root=/no/where"]),
    ("empty", ["ingest", "data=folder", "data.root=empty"]),
    ("file/below", ["ingest", "storage=file/below"]),
    ("nosuch://", ["ingest", "storage=nosuch://x"]),
    ("cycle", ["train", "+graph.autoencoder.needs={ingest: train}"]),
    ("`rayograph ingest`", ["train"]),
    ("`rayograph ingest`", ["encoder"]),
])
def test_a_users_mistake_is_one_line_that_names_it(rayograph, tmp_path, culprit, arguments):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    code, out, err = rayograph(*arguments)
    assert code == 2
    assert out == ""
    assert len(err) == 1, err
    assert err[0].startswith("rayograph: ")
    assert culprit in err[0]


def test_a_folder_of_one_image_is_refused_and_named(rayograph, tmp_path, monkeypatch):
    import contextlib

    import cluster.session

    monkeypatch.setattr(cluster.session, "session", lambda: contextlib.nullcontext(cluster.session.Resources(2, 0, 2)))
    monkeypatch.setattr(cluster.session.Resources, "refreshed", lambda self: self)
    (tmp_path / "xrays").mkdir()
    (tmp_path / "xrays" / "a.png").write_bytes(b"x")
    code, _, err = rayograph("ingest", "data=folder", "data.root=xrays")
    assert code == 2
    assert str(tmp_path / "xrays") in err[-1]
    assert "1 image" in err[-1]
    assert not any("Traceback" in line for line in err)


def test_nothing_is_left_in_the_working_folder_by_a_mistake(rayograph, tmp_path):
    rayograph("ingest", "data.size=63")
    rayograph("ingest", "--cfg", "job")
    assert list(tmp_path.iterdir()) == []


def test_cfg_prints_the_settings_as_yaml(rayograph):
    code, out, _ = rayograph("train", "--cfg", "job", "trainer.lr=0.5")
    assert code == 0
    settings = yaml.safe_load(out)
    assert settings["trainer"]["lr"] == 0.5
    assert settings["data"]["source"] == "phantom"
    assert "hydra" not in settings


def test_the_profile_of_a_data_set_applies_by_itself(rayograph):
    images = [yaml.safe_load(rayograph("train", "--cfg", "job", f"data={data}")[1])["trainer"]["images"]
              for data in ("phantom", "folder")]
    assert images[0] < images[1]


def test_a_node_of_the_graph_has_the_help_of_its_stage(rayograph):
    code, out, _ = rayograph("sample-reconstruction", "graph=arms", "--help")
    assert code == 0
    assert "sample.strategy" in out
    code, _, err = rayograph("sample-nosuch", "graph=arms", "--help")
    assert code == 2
    assert [line for line in err if "sample-nosuch" in line] == err


def test_a_stages_help_lists_the_choices(rayograph):
    code, out, _ = rayograph("train", "--help")
    assert code == 0
    assert "profile" in out
    assert "phantom" in out


def test_a_failure_shows_its_traceback_and_is_told_from_a_mistake(rayograph, monkeypatch):
    from pipelines.graph import run

    def broken(*_, **__):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(run, "run_stages", broken)
    code, _, err = rayograph("ingest")
    assert code == 1
    assert any("Traceback" in line for line in err)
    assert "the disk is on fire" in err[-1]


def test_an_interrupt_says_how_to_go_on(rayograph, monkeypatch):
    from pipelines.graph import run

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_stages", interrupted)
    code, _, err = rayograph("ingest")
    assert code == 130
    assert len(err) == 1


def test_a_sweep_runs_every_setting_and_returns_the_worst_code(rayograph, monkeypatch):
    from pipelines.graph import run

    seen = []
    monkeypatch.setattr(run, "run_stages", lambda settings, *_, **__: seen.append(settings.seed))
    code, _, _ = rayograph("ingest", "--multirun", "seed=0,1", "name=s${seed}")
    assert (code, seen) == (0, [0, 1])
    code, _, _ = rayograph("ingest", "--multirun", "seed=2,-1", "name=s${seed}")
    assert (code, seen) == (2, [0, 1, 2])


def test_a_sweep_does_not_write_one_folder_twice(rayograph, monkeypatch):
    from pipelines.graph import run

    monkeypatch.setattr(run, "run_stages", lambda *_, **__: True)
    code, _, err = rayograph("ingest", "--multirun", "seed=0,1")
    assert code == 2
    assert "twice" in err[-1]


def test_the_installed_command_returns_the_code_and_no_traceback(tmp_path):
    """The same through a process of its own, from a folder that is not the checkout's."""
    done = subprocess.run([sys.executable, "-c", "from pipelines.cli import main; main()", "train"],
                          capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "rayograph ingest" in done.stderr
