"""Ring: memory is used again only when nobody looks at it, and is all there from the start."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from itertools import islice

import pytest
import torch

from mixcl_dist.data_shards.streaming.ring import HELD, Layout, StreamError, _allocate
from mixcl_dist.data_shards.streaming.stream import PatchStream


def stream_of(built, workers: int) -> PatchStream:
    return PatchStream(built, batch_size=4, seed=3, workers=workers, label_cases={"a", "b"})


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_kept_do_not_change(built, workers):
    fresh = [(batch.image.clone(), batch.label.clone()) for batch in islice(stream_of(built, workers), 12)]
    kept = [(batch.image, batch.label) for batch in islice(stream_of(built, workers), 12)]
    for (image, label), (kept_image, kept_label) in zip(fresh, kept, strict=True):
        assert torch.equal(image, kept_image) and torch.equal(label, kept_label)


@pytest.mark.parametrize("part", [lambda b: b.image[1:, 0, 3], lambda b: b.label[2], lambda b: b.image.numpy()[2:]])
def test_a_part_of_a_tensor_keeps_its_batch(built, part):
    stream = iter(stream_of(built, workers=1))
    kept = part(next(stream))
    before = torch.as_tensor(kept).clone()
    for _ in range(3 * HELD + 6):
        next(stream)
    assert torch.equal(before, torch.as_tensor(kept))


def test_memory_of_batches_that_are_let_go_is_used_again(built):
    places = []
    for batch in islice(stream_of(built, workers=0), 6):
        places.append(batch.image.data_ptr())
        del batch
        gc.collect()
    assert len(set(places)) <= HELD + 1


def test_batches_outlive_their_stream(built):
    stream = iter(stream_of(built, workers=1))
    batch = next(stream)
    before = batch.image.clone()
    del stream
    gc.collect()
    assert torch.equal(batch.image, before)


@pytest.mark.slow
def test_a_program_that_fails_with_its_stream_open_ends(built):
    """Workers heed no SIGTERM, by which Python asks its processes to end before it waits for them."""
    program = (
        "import sys\n"
        "from mixcl_dist.data_shards.streaming.stream import PatchStream\n"
        "if __name__ == '__main__':\n"
        "    stream = iter(PatchStream(sys.argv[1], batch_size=4, seed=3, workers=1, label_cases={'a'}))\n"
        "    next(stream)\n"
        "    raise SystemError('as planned')\n"
    )
    script = built.parent / "fails.py"
    script.write_text(program)
    done = subprocess.run([sys.executable, script, built], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "as planned" in done.stderr


def test_arrays_of_a_layout_do_not_overlap():
    layout = Layout(entries=3, rows=2, shape=(5, 6, 7), labels=True)
    file, memory = _allocate(layout.bytes)
    arrays = [array for entry in range(3) for array in layout.arrays(memory, entry)]
    for number, array in enumerate(arrays):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(arrays))
    assert arrays[0].shape == (2, 5, 6, 7)
    file.close()


def test_too_little_memory_is_one_line_with_a_cure():
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StreamError, match=r"no 2 MiB of memory for batches .*; lower the batch size"):
            _allocate(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
