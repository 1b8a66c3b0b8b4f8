import jax.numpy as jnp

from electrax.models.masks import (
    document_index,
    document_mask,
    document_positions,
    one_way_mask,
    padding_mask,
    sees_neighbour,
    segment_ids,
)

PAD, CLS, SEP = 0, 1, 2
PACKED = jnp.array([[CLS, 7, SEP, CLS, 8, 9, SEP, PAD]])


def test_document_index_counts_cls_and_is_zero_for_padding():
    assert document_index(PACKED, CLS, PAD).tolist() == [[1, 1, 1, 2, 2, 2, 2, 0]]


def test_document_positions_start_again_at_every_cls():
    assert document_positions(PACKED, CLS).tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]


def test_segments_change_after_the_first_sep_and_padding_is_zero():
    pair = jnp.array([[CLS, 7, SEP, 8, 9, SEP, PAD, PAD], [CLS, 7, 8, SEP, PAD, PAD, PAD, PAD]])
    assert segment_ids(pair, SEP, PAD).tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0] * 8]


def test_padding_mask_lets_every_query_see_the_real_tokens():
    assert padding_mask(jnp.array([[True, True, False]])).tolist() == [[[[True, True, False]]]]


def test_document_mask_joins_tokens_of_one_document():
    mask = document_mask(jnp.array([[1, 1, 2, 0]]))[0, 0].astype(int)
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


DOCUMENTS = document_mask(jnp.array([[1, 1, 1, 2, 2]]))
REAL = padding_mask(jnp.array([[True, True, True, False]]))


def test_one_way_masks_keep_what_is_not_after_or_not_before_within_a_document():
    assert one_way_mask(DOCUMENTS)[0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    backwards = one_way_mask(DOCUMENTS, backwards=True)[0, 0]
    assert backwards.tolist() == one_way_mask(DOCUMENTS)[0, 0].T.tolist()


def test_one_way_masks_keep_padding_out():
    forwards, backwards = one_way_mask(REAL)[0, 0], one_way_mask(REAL, backwards=True)[0, 0]
    assert forwards.astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert backwards.astype(int).tolist() == [[1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_a_neighbour_is_seen_within_the_row_and_its_document_only():
    assert sees_neighbour(DOCUMENTS, 1).astype(int).tolist() == [[0, 1, 1, 0, 1]]
    assert sees_neighbour(DOCUMENTS, -1).astype(int).tolist() == [[1, 1, 0, 1, 0]]
    assert sees_neighbour(REAL, -1).astype(int).tolist() == [[1, 1, 0, 0]]
