"""TensorBoard in a real browser: the page that tells a run's story is there, and its charts have lines in them."""

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
RECIPE = """
model: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.25}
teacher: {class: "experiments.models:ImageClassifier", network: resnet20, width: 0.5}
data: {class: "experiments.data:Digits", batch_size: 64}
trainer: {accelerator: cpu, limit_train_batches: 4, limit_val_batches: 2, enable_progress_bar: false}
distillers: {scores: {class: SoftLabelDistiller}}
strategies:
  cut:
    {class: SensitivePruneStrategy, start_epoch: 1, target_ratio: 0.5, metric_name: val_loss, mode: min,
     delta_rate: 0.5, eval_rate: 0.05}
  distil: {class: DistillationStrategy, distillers: [scores], start_epoch: 2, end_epoch: 3}
  quantize: {class: QuantizationStrategy, start_epoch: 3, activation_quantize_type: moving_average_abs_max}
compressor: {epoch: 5, strategies: [cut, distil, quantize], checkpoint_path: checkpoints}
"""
CHARTS = [
    "acc", "loss", "FLOPs", "parameters", "units kept, by layer", "ranges",
    "signal to noise at the start of quantization, dB, by layer",
]  # fmt: skip


@contextlib.contextmanager
def tensorboard(folder):
    """Its address while it runs."""
    with contextlib.closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{found.getsockname()[1]}"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--port", address.rpartition(":")[2]], stderr=subprocess.DEVNULL) as server:
        end = time.time() + 60
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
                break
            assert time.time() < end
            time.sleep(0.2)
        try:
            yield address
        finally:
            server.kill()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_of_a_chain_shows_its_charts(tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    image = pytest.importorskip("matplotlib.image")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "lightslim", "run", "recipe.yaml", "--out", "run"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    with tensorboard(tmp_path / "run" / "tensorboard") as address, api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.goto(f"{address}/#custom_scalars")
        for title in CHARTS:
            page.get_by_text(title, exact=True).first.wait_for(timeout=120_000)
        cards = page.locator("tf-custom-scalar-multi-line-chart-card")
        assert cards.count() == len(CHARTS)
        for index, title in enumerate(CHARTS):
            # A line, or the mark of a single point
            cards.nth(index).locator("svg path[d*='L'], svg g path[d^='M']").first.wait_for(
                state="attached", timeout=120_000
            )
            assert cards.nth(index).locator("svg path[d]").count() > 0, title
        page.wait_for_timeout(1000)
        picture = image.imread(io.BytesIO(page.screenshot()), format="png")
        colours = {tuple(pixel) for pixel in (picture[::3, ::3, :3] * 15).round().reshape(-1, 3).tolist()}
        assert len(colours) > 30, "the page is all but blank"
        for tab, text in (
            ("histograms", "weights_in_steps"),
            ("images", "sensitivity"),
            ("hparams", "data.batch_size"),
        ):
            page.goto("about:blank")
            page.goto(f"{address}/#{tab}")
            page.get_by_text(text).first.wait_for(timeout=120_000)
        browser.close()
