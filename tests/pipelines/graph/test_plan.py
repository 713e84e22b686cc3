import copy
import functools

import pytest

from cluster.errors import UserError
from pipelines.data import manifest
from pipelines.graph import run
from pipelines.graph.compose import load_settings
from pipelines.graph.plan import Plan
from pipelines.graph.settings import Node, StageSpec

UPSTREAM = {"ingest", "autoencoder", "encoder", "latents"}

composed = functools.cache(load_settings)


@pytest.fixture(autouse=True)
def listed_here(monkeypatch):
    """The raw data are listed in this process: another one takes a second to start, and a hundred are asked for."""
    monkeypatch.setattr(manifest, "run_in_subprocess", lambda function, *args: function(*args))


@pytest.fixture
def compose(tmp_path):
    """Settings with these overrides; nothing here runs a stage of the real graph, but its images are listed."""

    def settings(*overrides: str):
        found = copy.deepcopy(composed("storage=/unset", "name=run", "data.images=160", *overrides))
        if found.storage == "/unset":
            found.storage = str(tmp_path / "runs")
        return found

    return settings


def plan_of(settings) -> Plan:
    """The plan of a command that runs all nodes, and so looks at the raw data."""
    return Plan(settings, looked_at=settings.graph)


def prints(settings):
    plan = plan_of(settings)
    return {stage: plan.fingerprint(stage) for stage in settings.graph}


@pytest.fixture
def changed(compose):
    """The stages whose fingerprint differs once these overrides are given."""

    def compare(*overrides: str) -> set[str]:
        before, after = prints(compose()), prints(compose(*overrides))
        return {stage for stage in before if before[stage] != after[stage]}

    return compare


def test_fingerprints_are_the_same_in_the_next_process(compose):
    assert prints(compose()) == prints(compose())
    assert len(set(prints(compose()).values())) == len(compose().graph)


@pytest.mark.parametrize("override", ["data.size=32", "data.images=161", "seed=1", "data.deduplicate=false"])
def test_what_changes_the_images_changes_every_stage(changed, compose, override):
    assert changed(override) == set(compose().graph)


def test_the_denoisers_settings_leave_what_is_before_it(changed, compose):
    everything = set(compose().graph)
    for override in ("trainer.lr=0.5", "denoiser.layers=2", "condition.drop_mask=0.5", "trainer.select_by=val_loss",
                     "objective.min_snr=null", "trainer.precision=fp32"):
        assert changed(override) == everything - UPSTREAM
    assert changed("encoder.lr=0.5") == everything - {"ingest", "autoencoder"}
    assert changed("autoencoder.kl_weight=0.5") == everything - {"ingest", "encoder"}
    assert changed("sample.guidance=5") == everything - UPSTREAM - {"train"}
    assert changed("publish.license=mit") == {"publish"}


@pytest.mark.parametrize("override", [
    "trainer.workers=2", "trainer.zero_stage=3", "trainer.checkpoint_every=7", "trainer.keep_checkpoints=9",
    "trainer.log_every=11", "trainer.max_failures=0", "trainer.micro_batch=16", "trainer.offload=true",
    "trainer.compile=true", "trainer.milestone_every=5", "trainer.loggers=[]", "validate.images=3",
    "sample.actors=3", "encoder.checkpoint_seconds=1",
    "changed=redo", "name=another", "profile=demo",
])
def test_how_a_stage_is_run_changes_nothing(changed, override):
    assert changed(override) == set()


def test_a_folders_contents_change_its_ingest(tmp_path, compose):
    (tmp_path / "xrays").mkdir()
    (tmp_path / "xrays" / "a.png").write_bytes(b"x")
    settings = compose("data=folder", f"data.root={tmp_path / 'xrays'}")
    before = prints(settings)
    assert prints(settings) == before
    (tmp_path / "xrays" / "b.png").write_bytes(b"x")
    assert not set(prints(settings).values()) & set(before.values())


def finish(settings, *stages):
    """Leave what these stages leave, without their work."""
    plan = plan_of(settings)
    for stage in (name for name in run.order(settings) if name in stages):
        plan.begin(stage, redo=False)
        (plan.folder / stage).write_json("stage.json", {"fingerprint": plan.fingerprint(stage), "metrics": {}})


@pytest.fixture
def no_ray(monkeypatch):
    """Starting Ray fails the test: these mistakes are found before."""
    import cluster.session

    def started():
        raise AssertionError("Ray was started")

    monkeypatch.setattr(cluster.session, "session", started)


def test_done_means_done_with_these_settings(compose):
    finish(compose(), *UPSTREAM)
    assert all(plan_of(compose()).is_done(stage) for stage in UPSTREAM)
    assert all(plan_of(compose("trainer.lr=0.5")).is_done(stage) for stage in UPSTREAM)
    assert not any(plan_of(compose("data.size=32")).is_done(stage) for stage in UPSTREAM)
    assert not plan_of(compose()).is_done("train")


def test_a_begun_stage_is_not_done_and_goes_on(compose):
    plan = plan_of(compose())
    plan.begin("ingest", redo=False)
    (plan.folder / "ingest" / "images").write("part-00000.parquet", b"")
    assert not plan.is_done("ingest")
    plan.begin("ingest", redo=False)
    assert (plan.folder / "ingest" / "images").names() == ["part-00000.parquet"]


def test_other_settings_are_refused_and_named(compose):
    finish(compose(), "ingest")
    with pytest.raises(ValueError, match=r"data\.size 64 → 32") as refused:
        plan_of(compose("data.size=32")).begin("ingest", redo=False)
    assert "changed=redo" in str(refused.value)
    assert compose().storage in str(refused.value)
    assert plan_of(compose()).is_done("ingest"), "nothing was touched"


@pytest.mark.parametrize("finished", [True, False])
def test_redo_clears_what_other_settings_made(compose, finished):
    plan = plan_of(compose())
    plan.begin("ingest", redo=False)
    if finished:
        finish(compose(), "ingest")
    (plan.folder / "ingest" / "images").write("part-00000.parquet", b"")
    other = plan_of(compose("data.size=32"))
    with pytest.raises(ValueError, match=r"data\.size"):
        other.begin("ingest", redo=False)
    other.begin("ingest", redo=True)
    assert (plan.folder / "ingest").names() == ["begun.json"]
    assert not plan.is_done("ingest")
    assert not other.is_stale("ingest")
    assert plan.is_stale("ingest")


@pytest.mark.usefixtures("no_ray")
def test_files_that_are_not_ours_are_never_cleared(compose):
    plan = plan_of(compose())
    (plan.folder / "train").write("of the user.png", b"x")
    for redo in ([], ["changed=redo"]):
        with pytest.raises(UserError, match=r"run/train contains files that rayograph did not"):
            run.run_all(compose(*redo))
    assert (plan.folder / "train").read("of the user.png") == b"x"


@pytest.mark.parametrize(("root", "overlapping"), [
    ("xrays", True), ("xrays/train", True), (".", True), ("xrays-raw", False), ("others", False), ("link", True)])
def test_results_never_lie_among_the_raw_images(compose, tmp_path, root, overlapping):
    (tmp_path / "xrays").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "xrays")
    overrides = (f"storage={tmp_path}", "name=xrays", "data=folder", f"data.root={tmp_path / root}")
    if overlapping:
        with pytest.raises(UserError, match=r"data\.root"):
            compose(*overrides)
    else:
        compose(*overrides)


@pytest.mark.usefixtures("no_ray")
def test_a_trained_generator_is_cleared_only_when_told_so(compose):
    finish(compose(), *compose().graph)
    for overrides in (["trainer.lr=0.5"], ["encoder.lr=0.5"]):
        with pytest.raises(UserError, match="changed=redo"):
            run.run_all(compose(*overrides))
        with pytest.raises(AssertionError, match="Ray was started"):
            run.run_all(compose(*overrides, "changed=redo"))
    (plan_of(compose()).folder / "encoder").remove("begun.json")
    (plan_of(compose()).folder / "encoder").remove("stage.json")
    with pytest.raises(UserError, match=r"train depends on .*encoder"):
        run.run_all(compose())
    assert plan_of(compose()).is_done("train"), "nothing was touched"


def test_a_clearing_that_was_killed_is_not_gone_on_with_under_the_first_settings(compose, monkeypatch):
    """Whatever `begin` removes before it clears, the settings that made the folder must not find it half empty."""
    finish(compose(), "ingest")
    plan = plan_of(compose())
    (plan.folder / "ingest" / "images").write("part-00000.parquet", b"")
    (plan.folder / "ingest" / "quarantine").write("part-00000.parquet", b"")

    def killed(folder, marker):
        folder.filesystem.delete_dir(f"{folder.path}/quarantine")
        raise KeyboardInterrupt

    monkeypatch.setattr(type(plan.folder), "clear", killed)
    with pytest.raises(KeyboardInterrupt):
        plan_of(compose("data.size=32")).begin("ingest", redo=True)
    monkeypatch.undo()
    assert not plan_of(compose()).is_done("ingest")
    plan_of(compose()).begin("ingest", redo=True)
    assert (plan.folder / "ingest").names() == ["begun.json"]


def test_what_was_made_of_a_stages_earlier_work_is_not_taken_for_made_of_its_next(compose):
    """Settings A, then B, then A again: A's encoder is trained anew, and A's old latents are not of it."""
    everything = run.order(compose())
    finish(compose(), *everything)
    (plan_of(compose()).folder / "latents").write("part-00000.parquet", b"")
    plan_of(compose("encoder.lr=0.5")).begin("encoder", redo=True)
    plan = plan_of(compose())
    plan.begin("encoder", redo=True)
    assert [stage for stage in everything if plan.is_done(stage)] == ["ingest", "autoencoder"]
    with pytest.raises(ValueError, match="latents"):
        plan.begin("latents", redo=False)


def test_a_damaged_record_is_named(compose):
    finish(compose(), "ingest")
    (plan_of(compose()).folder / "ingest").write("stage.json", b"")
    with pytest.raises(RuntimeError, match=r"ingest/stage\.json is damaged"):
        plan_of(compose()).is_done("ingest")


def test_another_salt_is_other_settings(compose, monkeypatch):
    before = plan_of(compose()).fingerprint("ingest")
    monkeypatch.setenv("RAYOGRAPH_SALT", "of our own")
    assert plan_of(compose()).fingerprint("ingest") != before
    assert "of our own" not in str(plan_of(compose()).chosen("ingest"))


def test_a_missing_input_is_named_with_the_command_that_makes_it(compose):
    with pytest.raises(ValueError, match=r"train needs ingest.*`rayograph ingest`"):
        plan_of(compose()).check_inputs("train")
    finish(compose(), *UPSTREAM)
    plan_of(compose()).check_inputs("train")


def test_an_input_of_other_settings_is_named_with_what_differs(compose):
    finish(compose(), "ingest", "autoencoder", "encoder")
    with pytest.raises(ValueError, match=r"latents needs encoder.*encoder\.lr .* → 0\.5"):
        plan_of(compose("encoder.lr=0.5")).check_inputs("latents")


def test_an_input_whose_own_input_changed_is_named(compose):
    finish(compose(), "ingest", "autoencoder", "encoder")
    with pytest.raises(ValueError, match=r"latents needs ingest.*data\.size"):
        plan_of(compose("data.size=32")).check_inputs("latents")
    with pytest.raises(ValueError, match=r"train needs (ingest|autoencoder).*(data\.size|inputs)"):
        plan_of(compose("data.size=32")).check_inputs("train")


def test_stages_come_after_what_they_need(compose):
    settings = compose()
    nodes = run.order(settings)
    assert sorted(nodes) == sorted(settings.graph)
    plan = plan_of(settings)
    for node in settings.graph:
        assert all(nodes.index(need) < nodes.index(node) for need in plan.inputs(node))
    settings.graph = dict(reversed(settings.graph.items()))
    assert run.order(settings)[0] == "ingest"


def test_cycles_and_unknown_nodes_in_the_graph_are_named(compose):
    settings = compose()
    settings.graph["autoencoder"] = Node("autoencoder", {"ingest": ("report",)})
    with pytest.raises(UserError, match=r"autoencoder.*report.*cycle"):
        run.order(settings)
    with pytest.raises(UserError, match="cycle"):
        run.run_stages(settings, ["train"], redo=False)
    for override, culprit in (("+graph.encoder.needs={ingest: nothing}", "nothing"),
                              ("+graph.encoder.needs={nothing: ingest}", "nothing"),
                              ("+graph.encoder.stage=nothing", "nothing"),
                              ("+graph.encoder.with={trainer: 1}", "trainer"),
                              ("+graph.encoder.with={encoder.lr: -1}", r"encoder\.lr")):
        with pytest.raises(UserError, match=culprit):
            compose(override)


@pytest.mark.usefixtures("no_ray")
def test_nothing_is_started_where_all_is_done(compose, capsys):
    finish(compose(), "ingest")
    assert run.run_stages(compose(), ["ingest"], redo=False) is False
    assert "ingest" in capsys.readouterr().err


@pytest.mark.usefixtures("no_ray")
def test_mistakes_are_found_before_ray_starts(compose, tmp_path):
    finish(compose(), "ingest")
    (tmp_path / "file").write_bytes(b"")
    for stage, culprit, overrides in [
        ("ingest", r"data\.size", ["data.size=32"]),
        ("train", "autoencoder", []),
        ("ingest", r"data\.root", ["data=folder", "name=new"]),
        ("ingest", "/no/where", ["data=folder", "data.root=/no/where", "name=new"]),
        ("ingest", "no_source", ["data.source=no_source", "name=new"]),
        ("ingest", "file/below", [f"storage={tmp_path}/file/below"]),
    ]:
        with pytest.raises(ValueError, match=culprit):
            run.run_stages(compose(*overrides), [stage], redo=False)


def work(stage):
    """A stage function that counts its calls, and is killed the first time it is told to."""
    stage.folder.write(f"call-{len(stage.folder.names('.call'))}.call", b"")
    if stage.name == "second" and stage.settings.publish.license == "killed" and len(stage.folder.names(".call")) == 1:
        raise RuntimeError("killed")
    return {"images": 1}


@pytest.fixture
def small_graph(compose, monkeypatch):
    """Two stages of no work, and no Ray."""
    import contextlib

    import cluster.session

    monkeypatch.setattr(cluster.session, "session", lambda: contextlib.nullcontext(cluster.session.Resources(2, 0, 2)))
    monkeypatch.setattr(cluster.session.Resources, "refreshed", lambda self: self)

    def small(*overrides):
        settings = compose(*overrides)
        settings.stages = {
            "first": StageSpec(run=f"{__name__}:work", settings=("evaluate",)),
            "second": StageSpec(run=f"{__name__}:work", needs=("first",), settings=("publish",)),
        }
        settings.graph = {"first": Node("first", {}), "second": Node("second", {"first": ("first",)})}
        return settings

    return small


def calls(settings):
    return [len((plan_of(settings).folder / stage).names(".call")) for stage in ("first", "second")]


def test_each_stage_works_once(small_graph):
    settings = small_graph()
    assert run.run_all(settings) is True
    assert calls(settings) == [1, 1]
    assert run.run_all(settings) is False
    assert calls(settings) == [1, 1]
    record = plan_of(settings).record("second")
    assert record["metrics"]["images"] == 1
    assert record["metrics"]["seconds"] >= 0
    assert record["settings"]["publish.license"] == "other"
    assert record["inputs"] == {"first": plan_of(settings).fingerprint("first")}


def test_a_stage_that_failed_is_not_done_and_is_taken_up_again(small_graph):
    settings = small_graph("publish.license=killed")
    with pytest.raises(RuntimeError, match="killed"):
        run.run_all(settings)
    assert plan_of(settings).is_done("first")
    assert not plan_of(settings).is_done("second")
    run.run_all(settings)
    assert calls(settings) == [1, 2]
    assert plan_of(settings).is_done("second")


def test_the_whole_path_redoes_only_what_changed(small_graph):
    run.run_all(small_graph())
    run.run_all(settings := small_graph("publish.license=mit"))
    assert calls(settings) == [1, 1], "the second began in a cleared folder"
    assert plan_of(settings).is_done("second")
    run.run_all(settings := small_graph("publish.license=mit", "evaluate.images=7"))
    assert plan_of(settings).is_done("first")
    assert plan_of(settings).is_done("second")


def test_refuse_stops_before_anything_is_cleared(small_graph):
    run.run_all(small_graph())
    with pytest.raises(ValueError, match=r"publish\.license"):
        run.run_all(small_graph("publish.license=mit", "changed=refuse"))
    assert plan_of(small_graph()).is_done("second")


def test_one_stage_refuses_unless_told_to_redo(small_graph):
    run.run_all(small_graph())
    other = small_graph("publish.license=mit")
    with pytest.raises(ValueError, match=r"publish\.license"):
        run.run_stages(other, ["second"], redo=False)
    assert run.run_stages(other, ["second"], redo=True) is True
    assert plan_of(other).is_done("second")


@pytest.mark.usefixtures("no_ray")
def test_a_single_stage_does_not_make_a_trained_generator_out_of_date_by_the_way(compose, capsys):
    finish(compose(), *compose().graph)
    plan = plan_of(compose())
    for name in ("begun.json", "stage.json"):
        (plan.folder / "ingest").remove(name)
    with pytest.raises(UserError, match=r"train depends on ingest.*changed=redo"):
        run.run_stages(compose(), ["ingest"], redo=False)
    assert plan_of(compose()).record("train"), "nothing was touched"
    plan_of(compose("changed=redo")).begin("ingest", redo=True)
    assert "train: out of date" in capsys.readouterr().err


@pytest.mark.parametrize("entry", [".snapshots/precious", ".hidden"])
def test_hidden_files_of_the_user_are_not_ours_either(compose, entry):
    plan = plan_of(compose())
    folder, _, name = entry.rpartition("/")
    (plan.folder / "ingest" / folder if folder else plan.folder / "ingest").write(name, b"x")
    with pytest.raises(UserError, match="contains files that rayograph did not"):
        plan.begin("ingest", redo=True)


def test_an_override_of_a_node_leaves_the_runs_name(compose):
    settings = compose("name=lr-${encoder.lr}", "+graph.encoder.with={encoder.lr: 0.5}")
    assert settings.of("encoder").encoder.lr == 0.5
    assert settings.of("encoder").name == settings.name


def test_an_override_of_a_setting_that_the_stage_does_not_have_is_refused(compose):
    with pytest.raises(UserError, match=r"graph\.evaluate\.with.*sample\.images"):
        compose("+graph.evaluate.with={sample.images: 3}")


def test_another_name_of_an_arm_is_another_report(compose):
    before = prints(compose("graph=arms"))
    settings = compose("graph=arms")
    [renamed] = [node for node in settings.graph["report"].needs["sample"] if node.endswith("interpolation")]
    rename = {renamed: "walk"}
    settings.graph = {rename.get(name, name): Node(node.stage, {
        role: tuple(rename.get(need, need) for need in needs) for role, needs in node.needs.items()})
        for name, node in settings.graph.items()}
    settings.variants = {rename.get(name, name): variant for name, variant in settings.variants.items()}
    assert prints(settings)["walk"] == before[renamed]
    assert prints(settings)["report"] != before["report"]
