"""Files that are whole or absent: written under a temporary name, flushed, then renamed."""

import json
import os
from pathlib import Path

from safetensors.torch import save


def write_file(path, data):
    """Write bytes so that `path` holds either its old content or all of the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON."""
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def write_tensors(path, tensors, metadata=None):
    """Write a dict of tensors as safetensors; metadata values become strings. Equal content, equal bytes."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    data = save(tensors, {k: str(v) for k, v in (metadata or {}).items()})
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()  # the library's order is arbitrary
    header += b" " * (-len(header) % 8)
    write_file(path, len(header).to_bytes(8, "little") + header + data[end:])
