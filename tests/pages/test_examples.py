"""The examples run, and show what they promise."""

from __future__ import annotations

import pickle
import re
import runpy
from pathlib import Path

import harness
import numpy as np
import printed
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Parts of other examples, which are no programs.
PARTS = {
    "cifar_parts.py",
    "gallery_measures.py",
    "gallery_training.py",
    "lsq_layers.py",
    "multihost_launch.py",
}


def run(folder: Path, name: str, *arguments: str, **env: str) -> str:
    """What an example prints, progress bars among it."""
    return printed.script(folder, EXAMPLES / name, *arguments, **env)


def test_the_page_has_every_example() -> None:
    page = harness.page("examples.md")
    linked = re.findall(r"\]\(\.\./\.\./examples/(\w+\.py)\)", page)
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert len(linked) == len(set(linked))
    assert set(linked) == files
    lines = {name: len((EXAMPLES / name).read_text().splitlines()) for name in files}
    assert {name: count for name, count in lines.items() if count >= 120} == {}
    headings = re.findall(r"^### `(\w+\.py)`$", page, re.MULTILINE)
    assert set(headings) == files - PARTS


PICTURES = [
    f"gallery_{name}.png"
    for name in (
        *("sharpness", "line", "surface", "path", "eigenvectors"),
        *("spectrum", "ggn", "sampling"),
    )
]


def test_the_gallery_shows_every_picture() -> None:
    page = harness.page("gallery.md")
    assert re.findall(r"!\[.+?\]\(\.\./images/(gallery_\w+\.png)\)", page) == PICTURES
    images = EXAMPLES.parent / "docs/images"
    assert max((images / name).stat().st_size for name in PICTURES) < 80_000


@pytest.mark.slow
def test_the_gallery_is_drawn(tmp_path: Path) -> None:
    run(tmp_path, "gallery.py", "--quick", "--out", "new/here")
    for name in PICTURES:
        printed.assert_is_picture(tmp_path / "new/here" / name, 700, 350, 5_000)


@pytest.mark.slow
def test_cifar_trains_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    numbers = r"Epoch (\d+): loss ([\d.]+), .*ascent_rate ([\d.]+), .*accuracy ([\d.]+)"
    command = tmp_path, "cifar.py", "--width", "4", "--out", "run", "--epochs"
    epochs = re.findall(numbers, run(*command, "2"))
    assert [epoch for epoch, *_ in epochs] == ["1", "2"]
    ((third, loss, rate, accuracy),) = re.findall(numbers, run(*command, "3"))
    assert third == "3"
    assert float(loss) < 2.3
    assert float(accuracy) > 15
    # 21 steps per epoch, of which the first 40 and few more ascend: the count goes on.
    assert 40 / 63 <= float(rate) + 1e-3 < 1
    written = b"".join(x.read_bytes() for x in (tmp_path / "run").glob("events*"))
    for tag in (b"test_accuracy", b"ascent_rate", b"sharpness_gap"):
        assert written.count(tag) >= 2


def test_cifar_reads_the_archive_and_arrays(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import cifar_parts

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 12)
    rows = images.transpose(0, 3, 1, 2).reshape(12, -1)  # red, green, blue
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, part in zip(names, np.split(np.arange(12), 6), strict=True):
        content = {b"data": rows[part], b"labels": labels[part].tolist()}
        (tmp_path / name).write_bytes(pickle.dumps(content))
    archive = cifar_parts.load(tmp_path)
    wanted = images[:10], labels[:10], images[10:], labels[10:]
    keys = "train_x", "train_y", "test_x", "test_y"
    np.savez(tmp_path / "cifar.npz", **dict(zip(keys, wanted, strict=True)))
    for read in (archive, cifar_parts.load(tmp_path / "cifar.npz")):
        for found, expected in zip(read, wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
    # A ramp stays one but for the margin, and about half of them are flipped.
    ramp = np.broadcast_to(np.arange(32.0)[None, None, :, None], (64, 32, 32, 3))
    slopes = np.diff(cifar_parts.augmented(rng, ramp, flips=True)[:, 16, 4:28, 0])
    assert set(np.unique(slopes)) == {-1, 1}


@pytest.mark.slow
def test_vit_is_fine_tuned(tmp_path: Path) -> None:
    *_, found, expected = run(tmp_path, "vit_finetune.py", "--quick").splitlines()
    numbers = r"Test accuracy ([\d.]+) % by AdamW, ([\d.]+) % by SAM"
    assert all(float(x) > 40 for x in re.search(numbers, found).groups())
    assert "of 2 seeds" in found
    assert expected.startswith("Expected without --quick: ")


@pytest.mark.slow
def test_adapters_and_merged_weights_are_perturbed(tmp_path: Path, monkeypatch) -> None:
    output = run(tmp_path, "lora.py", "--quick")
    assert 20 < float(re.search(r"no perturbation: ([\d.]+) %", output)[1]) < 100
    gains = re.findall(r"^(\w+) .* rho [\d.]+: [+-][\d.]+ ± [\d.]+$", output, re.M)
    assert gains == ["SAM", "SAM", "noise"]
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import lora

    rng = np.random.default_rng(0)
    shapes = [(64, 16), (16, 10)]
    params = [(rng.normal(size=s) / 8, np.zeros(s[1])) for s in shapes]
    batches = rng.normal(size=(3, 8, 64)), rng.integers(10, size=(3, 8))
    adapters = lora.new_adapters(params, rng)
    found = {
        (name, rho): lora.fit(*method, rho, params, adapters, batches)[0][0]
        for name, method in lora.METHODS.items()
        for rho in (0.0, 0.5)
    }
    nowhere, *others = (w for (_, rho), w in found.items() if not rho)
    for w in others:
        np.testing.assert_allclose(w, nowhere, atol=1e-5)
    for w in (w for (_, rho), w in found.items() if rho):
        assert sum(np.allclose(w, other, atol=1e-4) for other in found.values()) == 1


@pytest.mark.slow
def test_accumulated_gradients_train_the_large_batch(tmp_path: Path) -> None:
    output = run(tmp_path, "accumulate.py")
    assert re.findall(r"(\d+) of them perturbed", output) == ["20", "20"]
    numbers = r"are (\S+) of their way apart, for (\d+)%"
    apart, less = re.search(numbers, output).groups()
    assert float(apart) < 1e-2
    assert int(less) > 50


@pytest.mark.slow
def test_a_sharded_transformer_trains_as_on_one_device(tmp_path: Path) -> None:
    output = run(tmp_path, "sharded_transformer.py", XLA_FLAGS="")
    numbers = (
        r"(\d+) of .* perturbed on one device, (\d+) on eight, weights (\S+) apart"
    )
    one, eight, apart = re.search(numbers, output).groups()
    assert one == eight
    assert 20 <= int(one) < 60  # two windows of ten, and then not all
    assert float(apart) < 1e-8
    # FSDP over two devices and tensor parallel over four.
    lines = output.splitlines()
    assert "query (32, 4, 8)  on each device (16, 1, 8)" in lines
    assert "down  (128, 32)   on each device (32, 16)" in lines


@pytest.mark.slow
def test_the_quick_start_shows_sam(tmp_path: Path) -> None:
    output = run(tmp_path, "quickstart.py")
    found = dict(re.findall(r"^(\w+) ([\d.]+)", output, re.MULTILINE))
    numbers = {name: float(value) for name, value in found.items()}
    assert numbers["SAM"] > numbers["SGD"] + 1
    assert numbers["ascended_norm"] > numbers["gradient_norm"]
    text = (EXAMPLES / "quickstart.py").read_text()
    kinds = re.findall(r"^# %%(.*)$", text, re.MULTILINE)
    assert set(kinds) == {"", " [markdown]"}


@pytest.mark.slow
def test_own_method_trains(capsys) -> None:
    runpy.run_path(str(EXAMPLES / "own_method.py"), run_name="__main__")
    output = capsys.readouterr().out
    pattern = r"Loss (.*) after 200 steps, (\d+) of them perturbed.\n"
    loss, ascents = re.fullmatch(pattern, output).groups()
    assert float(loss) < 0.5
    assert ascents == "100"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods", "least"),
    [
        ("plain_functions", ["AdamW", "vSAM"], 60),
        ("equinox_digits", ["SGD", "SAM"], 60),
        ("linen_batchnorm", ["SGD", "SAM-2"], 70),
        ("nnx_batchnorm", ["SGD", "SAM"], 70),
    ],
)
def test_examples_of_frameworks_train(
    name: str, methods: list[str], least: float, tmp_path: Path
) -> None:
    output = run(tmp_path, f"{name}.py", "--quick")
    found = re.findall(r"^([\w-]+) +([\d.]+) % test accuracy", output, re.MULTILINE)
    assert [method for method, _ in found] == methods
    assert all(float(accuracy) > least for _, accuracy in found)


@pytest.mark.slow
def test_digits_label_noise_prints_a_table(tmp_path: Path) -> None:
    output = run(tmp_path, "digits_label_noise.py", "--quick", COLUMNS="80")
    assert max(map(len, output.splitlines())) <= 80
    table = printed.boxed_table(output)
    # vSAM warms up in these 44 steps.
    gradients = {"SGD": 1, "SGD 2x": 2, "SAM": 2, "vSAM": 2, "MSAM": 1}
    gradients |= {"quarter-batch SAM": 1.25}
    assert {name: float(cells[-1]) for name, cells in table.items()} == gradients
    assert all(10 < float(cell.split()[0]) <= 100 for cell, _ in table.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "vsam"])
def test_rho_is_tuned_by_held_out_images(tmp_path: Path, method: str) -> None:
    output = run(tmp_path, "tune_rho.py", "--quick", "--method", method, COLUMNS="80")
    rows = printed.boxed_table(output)
    means = {float(rho): float(mean) for rho, (mean, *_) in rows.items()}
    assert len(means) == 9
    chosen, tested = re.search(
        r"rho ([\d.]+), test accuracy ([\d.]+) %", output
    ).groups()
    assert means[float(chosen)] == max(means.values())
    assert float(tested) > 50
    assert re.search(r"18 training runs, .* s, one after the other [\d.]+ s", output)


def test_the_page_on_own_methods_shows_the_example() -> None:
    block = harness.code("own_method.md")[0]
    function = block.partition("\n\n\n")[2]
    assert function.startswith("def sparse_sam(")
    assert function in (EXAMPLES / "own_method.py").read_text()
