"""Vocabulary sizes of the runs of a study."""

from .. import data


class Vocabularies:
    """Vocabulary sizes by data section, each looked up once: a study has few sections and many runs."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def of(self, config: data.DataConfig) -> int:
        """Tokens in the vocabulary.

        Raises:
            UserError: the given tokenizer model cannot be read.
        """
        key = config.model_dump_json()
        if key not in self._known:
            self._known[key] = data.vocabulary_size(config)
        return self._known[key]
