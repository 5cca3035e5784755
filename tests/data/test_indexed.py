import warnings

import numpy as np
import pytest

from steerscale.data.indexed import IndexedWriter, map_tokens, token_dtype

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it announces the accelerators that are not installed
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

DOCUMENTS = [[5, 6, 7, 1], [1], [9] * 1000 + [1], [60000, 1]]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_files_are_those_of_megatron_byte_for_byte(tmp_path, dtype):
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in DOCUMENTS:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    with IndexedWriter(tmp_path / "ours", dtype=dtype) as writer:
        for batch in (DOCUMENTS[:3], [], DOCUMENTS[3:]):
            tokens = np.array([token for document in batch for token in document], dtype=dtype)
            writer.add(tokens.tobytes(), np.array(list(map(len, batch)), dtype=np.int32))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_our_files(tmp_path):
    with IndexedWriter(tmp_path / "ours", dtype="uint16") as writer:
        for document in DOCUMENTS:
            writer.add(np.array(document, dtype=np.uint16).tobytes(), np.array([len(document)], dtype=np.int32))
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[index].tolist() for index in range(len(dataset))] == DOCUMENTS
    assert dataset.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert map_tokens(tmp_path / "ours", dtype="uint16").tolist() == [t for document in DOCUMENTS for t in document]


@pytest.mark.parametrize("vocab_size", [300, 65499, 65500, 200000])
def test_dtype_follows_megatron(vocab_size):
    assert np.dtype(token_dtype(vocab_size)) == DType.optimal_dtype(vocab_size)


def test_no_index_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "half", dtype="uint16"):
        raise RuntimeError
    assert not (tmp_path / "half.idx").exists()
