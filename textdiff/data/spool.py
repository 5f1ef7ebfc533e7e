"""Documents that come over a network are read once: later passes read what the first one kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from textdiff.data.document_stream import Documents, TextBlock
from textdiff.data.sections import Source

_BATCH_CHARACTERS = 2_000_000
_SCHEMA = pa.schema([("text", pa.large_string()), ("last", pa.bool_())])


@contextmanager
def spooled(
    corpora: Sequence[Documents], sources: Sequence[Source], folder: Path
) -> Iterator[list[Documents]]:
    """Yield the corpora; those that are streamed are kept on disk, compressed, while entered.

    Args:
        corpora: the documents of the sources.
        sources: the sources.
        folder: where there is room for a compressed copy.
    """
    if not any(source.streaming for source in sources):
        yield list(corpora)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".partial-stream-", dir=folder) as room:
        yield [
            _kept(documents, Path(room) / f"{number}.arrow") if source.streaming else documents
            for number, (documents, source) in enumerate(zip(corpora, sources, strict=True))
        ]


def _kept(documents: Documents, path: Path) -> Documents:
    """Return documents whose first whole pass writes a file, which later ones read."""

    def read() -> Iterator[TextBlock]:
        if path.exists():
            yield from _read(path)
            return
        unfinished = path.with_suffix(".unfinished")
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(str(unfinished), _SCHEMA, options=options) as file:
            held: list[TextBlock] = []
            size = 0
            for block in documents.blocks():
                held.append(block)
                size += len(block.text) + 1
                if size >= _BATCH_CHARACTERS:
                    file.write_batch(_batch(held))
                    held, size = [], 0
                yield block
            file.write_batch(_batch(held))
        unfinished.rename(path)

    return replace(documents, blocks=read)


def _batch(blocks: list[TextBlock]) -> pa.RecordBatch:
    texts, lasts = [block.text for block in blocks], [block.last for block in blocks]
    return pa.RecordBatch.from_arrays(
        [pa.array(texts, pa.large_string()), pa.array(lasts, pa.bool_())], schema=_SCHEMA
    )


def _read(path: Path) -> Iterator[TextBlock]:
    with pa.memory_map(str(path)) as source:
        file = pa.ipc.open_file(source)
        for number in range(file.num_record_batches):
            batch = file.get_batch(number)
            texts, lasts = (column.to_pylist() for column in batch.columns)
            yield from map(TextBlock, texts, lasts)
