# pyright: reportMissingImports=false
"""Let SAELens read folders, and keep its codes and reconstructions of some rows.

    .venv-peers/bin/python tools/read_saelens.py FOLDER

Runs in the environment of `tools/make_peers.sh` and never imports mechatlas. FOLDER holds
`x.safetensors` and one folder a dictionary; `answers.safetensors` is written beside them, with
`NAME/code`, `NAME/decoded` and `NAME/output`. A folder named `sparsify_*` is read by SAELens'
reader of that format, of which only `NAME/W_dec` is kept.
"""

import sys
from pathlib import Path

import peer_shims  # noqa: F401 - before the libraries
import torch
from safetensors.torch import load_file, save_file


def main(folder: Path) -> None:
    """Read all dictionaries of a folder."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    x = load_file(folder / "x.safetensors")["x"]
    answers = {}
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        if path.name.startswith("sparsify"):
            _, tensors = sparsify_disk_loader(path, cfg_overrides={"dtype": "float32"})
            answers[f"{path.name}/W_dec"] = tensors["W_dec"]
            continue
        sae = SAE.load_from_disk(path)
        with torch.no_grad():
            code = sae.encode(x)
            decoded = sae.decode(code)
            own = {"code": code, "decoded": decoded, "output": sae(x)}
        answers |= {f"{path.name}/{key}": tensor for key, tensor in own.items()}
    save_file(
        {key: t.contiguous().clone() for key, t in answers.items()}, folder / "answers.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
