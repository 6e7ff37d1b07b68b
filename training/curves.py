"""What trackers draw of a record: scalars by name, of one line."""

from collections.abc import Mapping
from typing import Any


def curves(line: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of a step or eval line as the record has them; what is null there, or no scalar, is left out."""
    if line["kind"] == "eval":
        found = {f"{line['domain']}/{name}": line[name] for name in ("loss", "bits_per_byte", "score")}
        return {f"eval/{name}": value for name, value in found.items() if value is not None}
    found = {
        "loss": line["loss"],
        "grad_norm": line["grad_norm"]["total"],
        "lr": line["lr"],
        "tokens_per_second": line["tokens_per_second"],
        "noise/b_simple": line["noise"]["all"]["b_simple"] if line["noise"] else None,
    }
    found |= {f"router/max_violation/{layer['layer']}": layer["max_violation"] for layer in line["router"]}
    return {name: value for name, value in found.items() if value is not None}
