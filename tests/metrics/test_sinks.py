"""MLflow and Comet: all steps of all starts in one run; what is missing is reported before it."""

import importlib.util
import json
import zipfile

import pytest

from megatron_ft.config.arguments import parse_args
from megatron_ft.errors import UserError
from megatron_ft.metrics.model_facts import ShapeFacts
from megatron_ft.metrics.sinks import check_sinks, open_sinks

NAMES = {"train/loss", "validation/va lid/loss"}


def config_of(tmp_path, *flags):
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    words = ["--preset", "tiny", "--data-prefix", "d", "--train-iters", "40", "--tokenizer-file", str(tokenizer)]
    return parse_args([*words, *flags])


def write_steps(config, save, first, last):
    """One start of a run: steps `first` to `last`."""
    save.mkdir(exist_ok=True)
    [sink] = open_sinks(config, ShapeFacts(config, config.shape), save, first - 1)
    for step in range(first, last + 1):
        sink.write(step, {"train/loss": 1 / step, "validation/va lid/loss": float(step)})
    sink.close()


def test_mlflow_continues_the_same_run_after_a_resume(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    store, save = tmp_path / "mlruns", tmp_path / "run"
    flags = ("--mlflow-tracking-uri", str(store), "--mlflow-experiment", "first")
    write_steps(config_of(tmp_path, *flags), save, 1, 3)
    kept = (save / "mlflow_run_id").read_text()
    write_steps(config_of(tmp_path, *flags, "--lr", "1e-3"), save, 4, 5)
    client = mlflow.tracking.MlflowClient(str(store))
    experiment = client.get_experiment_by_name("first")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == kept and run.info.status == "FINISHED"
    assert run.data.params["preset"] == "tiny"
    assert run.data.metrics.keys() == NAMES
    history = client.get_metric_history(kept, "train/loss")
    assert [(item.step, item.value) for item in history] == [(step, 1 / step) for step in range(1, 6)]


def test_mlflow_server_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = config_of(tmp_path, "--mlflow-tracking-uri", "http://127.0.0.1:9", "--mlflow-experiment", "first")
    with pytest.raises(UserError, match="^--mlflow-experiment: .*correct --mlflow-tracking-uri") as error:
        open_sinks(config, ShapeFacts(config, config.shape), tmp_path, 0)
    assert "\n" not in str(error.value)


def test_comet_continues_the_same_experiment_after_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_START_ONLINE", "0")
    config, save = config_of(tmp_path, "--comet-project", "first"), tmp_path / "run"
    write_steps(config, save, 1, 3)
    kept = (save / "comet_experiment_key").read_text()
    write_steps(config, save, 4, 5)
    archives = sorted((save / "comet").glob("*.zip"))
    assert len(archives) == 2 and all(kept in archive.name for archive in archives)
    steps = set()
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            for line in file.read("messages.json").splitlines():
                metric = json.loads(line)["payload"].get("metric")
                if metric and metric["metricName"] == "train/loss":
                    steps.add((metric["step"], round(float(metric["metricValue"]), 6)))
    assert steps == {(step, round(1 / step, 6)) for step in range(1, 6)}


@pytest.mark.parametrize(
    ("flag", "module"), [("wandb-project", "wandb"), ("mlflow-experiment", "mlflow"), ("comet-project", "comet_ml")]
)
def test_a_missing_package_is_a_user_error(tmp_path, monkeypatch, flag, module):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else True)
    with pytest.raises(UserError, match=f"--{flag}: {module} is not installed; `pip install "):
        check_sinks(config_of(tmp_path, f"--{flag}", "p"))


def test_a_tracking_uri_needs_an_experiment(tmp_path):
    with pytest.raises(UserError, match="--mlflow-tracking-uri needs --mlflow-experiment"):
        check_sinks(config_of(tmp_path, "--mlflow-tracking-uri", "mlruns"))
