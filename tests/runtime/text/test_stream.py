from __future__ import annotations

import pytest
from edgetune_runtime.text.stream import TextStream


def shown(chunks: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(stop)
    pieces = []
    for chunk in chunks:
        pieces.append(stream.push(chunk))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream.stopped


def test_a_character_split_over_tokens_is_shown_once_it_is_whole() -> None:
    data = "für 5 €".encode()
    pieces, _ = shown([data[i : i + 1] for i in range(len(data))])
    assert "".join(pieces) == "für 5 €"
    assert "\ufffd" not in "".join(pieces)


def test_a_character_that_never_ends_is_shown_as_a_replacement() -> None:
    assert shown([b"a", "€".encode()[:2]]) == (["a", "", "\ufffd"], False)


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_stop_text_is_found_wherever_tokens_split_it(cut: int) -> None:
    data = b"yes END no"
    pieces, stopped = shown([data[:cut], data[cut:]], ("END",))
    assert ("".join(pieces), stopped) == ("yes ", True)


def test_text_that_may_begin_a_stop_text_is_held_back() -> None:
    stream = TextStream(("END", "\n\n"))
    assert stream.push(b"a\n") == "a"
    assert stream.push(b"b E") == "\nb "
    assert stream.push(b"N") == ""
    assert stream.push(b"T") == "ENT"
    assert stream.push(b"EN") == ""
    assert stream.finish() == "EN"


def test_the_earliest_of_several_stop_texts_ends_the_text() -> None:
    assert shown([b"one two three"], ("three", "two")) == (["one ", ""], True)
