"""What folders hold: everything to the bit, or the weights of a checkpoint."""

from safetensors.torch import load_file

from tiny import equal


def snapshot(folder):
    """Returns when everything in a folder was written and, of the files, the content."""
    paths = [folder, *folder.rglob("*")]
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in paths
    }


def same_weights(first, second):
    return equal(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
