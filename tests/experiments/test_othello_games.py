"""Games and boards against rules of Othello written down once more, and the dataset that training reads."""

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from steerscale.data.config import DataConfig
from steerscale.data.dataset import SampleStream
from steerscale.errors import DataError
from steerscale.tokenizers.registry import load_tokenizer

pytest.importorskip("rust_reversi", reason="the extra `othello` is not installed")

from steerscale.experiments import othello_games
from steerscale.experiments.othello_board import board_labels
from steerscale.experiments.othello_edit import legal_after_flip, make_cases
from steerscale.experiments.othello_games import (
    GAME_TOKENS,
    MOVES,
    NAMES,
    PAD,
    SQUARES,
    TOKEN_OF,
    VOCABULARY,
    random_game,
    read_games,
    replay,
    write_games,
)

DIRECTIONS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


class Rules:
    """Othello with nested lists: 0 empty, 1 black, -1 white; rows and columns from 0."""

    def __init__(self) -> None:
        self.board = [[0] * 8 for _ in range(8)]
        self.board[3][3] = self.board[4][4] = -1
        self.board[3][4] = self.board[4][3] = 1
        self.mover = 1

    def flips(self, row: int, column: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        if self.board[row][column]:
            return found
        for down, right in DIRECTIONS:
            line, r, c = [], row + down, column + right
            while 0 <= r < 8 and 0 <= c < 8 and self.board[r][c] == -self.mover:
                line.append((r, c))
                r, c = r + down, c + right
            if line and 0 <= r < 8 and 0 <= c < 8 and self.board[r][c] == self.mover:
                found += line
        return found

    def legal(self) -> set[int]:
        return {8 * r + c for r in range(8) for c in range(8) if self.flips(r, c)}

    def play(self, square: int) -> None:
        flipped = self.flips(*divmod(square, 8))
        assert flipped
        for r, c in [*flipped, divmod(square, 8)]:
            self.board[r][c] = self.mover
        self.mover = -self.mover
        if not self.legal():
            self.mover = -self.mover
            if not self.legal():
                self.mover = 0


@pytest.fixture(scope="module")
def games() -> np.ndarray:
    """Random ones, among them some with a pass and one that ends early."""
    played = [random_game(f"test/{number}") for number in range(40)]
    played.append(next(game for number in count(40) if len(game := random_game(f"test/{number}")) < MOVES))
    found = np.zeros((len(played), GAME_TOKENS), dtype=np.int64)
    for row, moves in zip(found, played):
        row[1 : len(moves) + 1] = moves
    return found


def test_boards_and_legal_moves_are_those_of_the_rules(games: np.ndarray) -> None:
    boards, legal = replay(games)
    passes = 0
    for g, tokens in enumerate(games.tolist()):
        rules = Rules()
        for t, token in enumerate(tokens[1:]):
            if token == PAD:
                assert rules.mover == 0
                assert boards.mover_GT[g, t] == 0
                continue
            before = rules.mover
            assert SQUARES[token - 1] in rules.legal()
            rules.play(SQUARES[token - 1])
            board = np.array(rules.board).reshape(64)
            assert np.array_equal(boards.black_GT64[g, t], board == 1)
            assert np.array_equal(boards.white_GT64[g, t], board == -1)
            assert boards.mover_GT[g, t] == rules.mover
            assert set(legal[g][t]) == ({TOKEN_OF[square] for square in rules.legal()} if rules.mover else set())
            passes += before == rules.mover
    assert passes  # or nothing was seen of them
    assert (games[:, -1] == PAD).any()


def test_an_illegal_move_is_refused(games: np.ndarray) -> None:
    wrong = games[:1].copy()
    wrong[0, 1] = TOKEN_OF[0]
    with pytest.raises(DataError, match="illegal move a1"):
        replay(wrong)


def test_labels_are_seen_by_the_player_to_move(games: np.ndarray) -> None:
    boards, _ = replay(games)
    labels = board_labels(boards)
    white_moves = boards.mover_GT == -1
    assert (labels["mine"][white_moves] == np.array([0, 2, 1])[labels["colour"][white_moves]]).all()
    black_moves = boards.mover_GT == 1
    assert np.array_equal(labels["mine"][black_moves], labels["colour"][black_moves])
    assert white_moves.any()
    assert black_moves.any()


def test_legal_moves_after_a_flip_are_those_of_the_rules(games: np.ndarray) -> None:
    boards, _ = replay(games)
    for g, t in [(0, 8), (1, 20), (2, 33), (3, 47)]:
        black, white = boards.black_GT64[g, t], boards.white_GT64[g, t]
        for square in np.flatnonzero(black | white).tolist():
            rules = Rules()
            rules.board = (black.astype(int) - white).reshape(8, 8).tolist()
            rules.board[square // 8][square % 8] *= -1
            rules.mover = int(boards.mover_GT[g, t])
            expected = {TOKEN_OF[s] for s in rules.legal()}
            assert set(legal_after_flip(black, white, rules.mover, square)) == expected


def test_cases_change_what_is_legal(games: np.ndarray) -> None:
    boards, legal = replay(games)
    cases = make_cases(games, first_move=4, last_move=50, seed=0)
    assert len(cases) > 35
    for case in cases:
        (g,) = np.flatnonzero((games == case.tokens).all(1))
        t = case.at - 1
        assert 4 <= t <= 50
        assert set(case.before) == set(legal[g][t])
        assert set(case.after) != set(case.before)
        assert case.after
        assert boards.black_GT64[g, t, case.square] == case.black
        assert boards.white_GT64[g, t, case.square] != case.black
        assert case.mine == (case.black == (boards.mover_GT[g, t] > 0))
    assert {case.mine for case in cases} == {case.black for case in cases} == {True, False}


def test_dataset_gives_a_whole_game_a_sample_and_follows_the_seed(tmp_path: Path) -> None:
    write_games(tmp_path / "data", {"train": 2}, seed=4)  # by a start that was interrupted before it could say so
    write_games(tmp_path / "data", {"train": 12, "valid": 3, "test": 2}, seed=5)
    config = DataConfig(path=str(tmp_path / "data"), random_offset=False)
    stream = SampleStream(config, seq_len=GAME_TOKENS, seed=1)
    train = read_games(tmp_path / "data", "train")
    seen = np.stack([stream.tokens(position) for position in range(11)])
    assert (seen[:, 0] == PAD).all()
    assert sorted(map(tuple, seen[:, :-1])) == sorted(map(tuple, train[:-1]))  # the last has no label for its end
    assert stream.vocab_size == VOCABULARY
    assert read_games(tmp_path / "data", "test")[1, 1 : MOVES + 1].tolist()[:59] == random_game("5/test/1")[:59]
    with pytest.raises(DataError, match="has 2 games, fewer than the 3"):
        read_games(tmp_path / "data", "test", 3)


def test_tokenizer_reads_and_writes_moves(tmp_path: Path) -> None:
    write_games(tmp_path / "data", {"train": 3}, seed=0)
    tokenizer = load_tokenizer(tmp_path / "data" / "tokenizer")
    assert tokenizer.encode("f5 a1 h8") == [TOKEN_OF[NAMES.index(name)] for name in ("f5", "a1", "h8")]
    assert tokenizer.decode([PAD, 1, 60]) == "a1 h8"


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(othello_games.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'steerscale\[othello\]'"):
        write_games(tmp_path / "data", {"train": 3}, seed=0)
    assert not list(tmp_path.iterdir())
