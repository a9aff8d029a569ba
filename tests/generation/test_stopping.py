"""Stop strings: nothing of one is ever emitted, and nothing else is kept waiting."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.errors import RequestError
from jmoe.generation.stopping import StopStrings

letters = st.text("ab", max_size=4)
pieces_lists = st.lists(letters, max_size=10)
stops_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=3)


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first (the longest of those), and it."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def feed(pieces: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    watcher = StopStrings(stops)
    emitted = []
    for piece in pieces:
        text, stopped = watcher.push(piece)
        emitted.append(text)
        assert stopped == (watcher.matched is not None)
        if stopped:
            break
    emitted.append(watcher.finish())
    return emitted, watcher.matched


@given(pieces_lists, stops_lists)
def test_emits_what_the_naive_search_finds(pieces, stops):
    emitted, matched = feed(pieces, stops)
    assert ("".join(emitted), matched) == naive("".join(pieces), stops)


@given(pieces_lists, stops_lists)
def test_holds_back_only_what_may_become_a_stop_string(pieces, stops):
    watcher = StopStrings(stops)
    text = emitted = ""
    for piece in pieces:
        text += piece
        new, stopped = watcher.push(piece)
        emitted += new
        if stopped:
            assert emitted == naive(text, stops)[0]
            break
        held = text.removeprefix(emitted)
        assert emitted + held == text
        candidates = [text[i:] for i in range(len(text) + 1)]
        assert held == next(
            end for end in candidates if not end or any(s.startswith(end) for s in stops)
        )


@given(st.text("ab", max_size=20), stops_lists)
def test_cuts_between_pieces_change_nothing(text, stops):
    letter_by_letter, matched = feed(list(text), stops)
    whole, matched_whole = feed([text], stops)
    assert ("".join(letter_by_letter), matched) == ("".join(whole), matched_whole)


def test_stops_within_a_piece_and_drops_what_follows():
    watcher = StopStrings(["\n\n"])
    assert watcher.push("one\n") == ("one", False)
    assert watcher.push("\ntwo") == ("", True)
    assert watcher.matched == "\n\n"
    assert watcher.finish() == ""


def test_releases_a_false_start():
    watcher = StopStrings(["</answer>"])
    assert watcher.push("x </ans") == ("x ", False)
    assert watcher.push("ert>") == ("</ansert>", False)
    assert watcher.push("</") == ("", False)
    assert watcher.finish() == "</"
    assert watcher.matched is None


def test_the_stop_string_complete_first_wins_over_one_that_began_earlier():
    assert feed(["abc"], ["abcd", "bc"]) == (["a", ""], "bc")
    assert feed(["abcd"], ["abcd", "bc"]) == (["a", ""], "bc")
    assert feed(["abcd"], ["cd", "abcd"]) == (["", ""], "abcd")


def test_without_stop_strings_everything_passes():
    assert feed(["a", "", "b"], []) == (["a", "", "b", ""], None)


@pytest.mark.parametrize("stops", [[""], ["a", ""], "ab", [1]])
def test_refuses_what_is_no_list_of_texts(stops):
    with pytest.raises(RequestError, match="stop strings must be"):
        StopStrings(stops)
