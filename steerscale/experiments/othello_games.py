"""Random games of Othello as a dataset, and the boards along them. The rules are rust-reversi's (the extra `othello`).

A token is a square: 0 begins a game and fills it up, 1 .. 60 are the squares that are empty at the start, row by row. Every
game is GAME_TOKENS long, so that a sample of training is a game. A player who cannot move passes, which is no token.

Shapes: G games, T = 60 moves, 64 squares.
"""

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

import steerscale
from steerscale.data.indexed import IndexedWriter, map_tokens, token_dtype
from steerscale.data.manifest import TOKENIZER, DatasetManifest, SplitInfo, TokenizerInfo, inspect_dataset
from steerscale.errors import DataError
from steerscale.tokenizers.directory import new_directory
from steerscale.tokenizers.huggingface import HuggingFaceTokenizer

CENTRE = (27, 28, 35, 36)
SQUARES = [square for square in range(64) if square not in CENTRE]
"""Square, 8 row + column, of token 1, 2, ..."""
TOKEN_OF = {square: token for token, square in enumerate(SQUARES, 1)}
PAD = 0
MOVES = len(SQUARES)
VOCABULARY, GAME_TOKENS = MOVES + 1, MOVES + 1
NAMES = [f"{'abcdefgh'[square % 8]}{square // 8 + 1}" for square in range(64)]


class Boards(NamedTuple):
    """Every game after every move; what comes after a game's end is 0."""

    black_GT64: np.ndarray
    """bool: a black disc lies there."""
    white_GT64: np.ndarray
    """bool."""
    mover_GT: np.ndarray
    """int8: who moves next, +1 black, -1 white, 0: the game is over."""


def new_board() -> Any:
    """A rust-reversi board at the start. Raises DataError if the package is missing."""
    if importlib.util.find_spec("rust_reversi") is None:
        raise DataError("the Othello experiment needs rust-reversi: pip install 'steerscale[othello]'")
    import rust_reversi  # optional, so not above

    return rust_reversi.Board()


def random_game(seed: str) -> list[int]:
    """The tokens of a game in which every move is drawn evenly from the legal ones."""
    draw, board, moves = random.Random(seed), new_board(), []
    while not board.is_game_over():
        if board.is_pass():
            board.do_pass()
            continue
        square = draw.choice(board.get_legal_moves_vec())
        board.do_move(square)
        moves.append(TOKEN_OF[square])
    return moves


def set_up(black: int, white: int, mover: int) -> Any:
    """The rust-reversi board with these discs, bit 63 - square of a number for a square, and `mover` (+1 black) to move."""
    import rust_reversi

    own, other = (black, white) if mover > 0 else (white, black)
    board = new_board()
    board.set_board(own, other, rust_reversi.Turn.BLACK if mover > 0 else rust_reversi.Turn.WHITE)
    return board


def legal_tokens(board: Any) -> list[int]:
    """Tokens of the moves that the player to move has."""
    return [TOKEN_OF[square] for square in board.get_legal_moves_vec()]


def replay(games: np.ndarray) -> tuple[Boards, list[list[list[int]]]]:
    """The boards along games [G, GAME_TOKENS], and after each move the legal tokens, [G][T].

    Raises DataError for a move that is not legal.
    """
    shape = (len(games), MOVES)
    discs = np.zeros((2, *shape), dtype=np.uint64)
    mover_GT = np.zeros(shape, dtype=np.int8)
    legal: list[list[list[int]]] = []
    for g, tokens in enumerate(games.tolist()):
        board, turn, legal_T = new_board(), 1, []
        for t, token in enumerate(tokens[1:]):
            if token == PAD:
                legal_T.append([])
                continue
            if not board.is_legal_move(SQUARES[token - 1]):
                raise DataError(
                    f"game {g} has the illegal move {NAMES[SQUARES[token - 1]]} at {t}: make the games again"
                )
            board.do_move(SQUARES[token - 1])
            turn = -turn
            if board.is_pass() and not board.is_game_over():
                board.do_pass()
                turn = -turn
            own, other, _ = board.get_board()
            discs[:, g, t] = (own, other) if turn > 0 else (other, own)
            over = board.is_game_over()
            mover_GT[g, t] = 0 if over else turn
            legal_T.append([] if over else legal_tokens(board))
        legal.append(legal_T)
    black, white = (np.unpackbits(d.astype(">u8")[..., None].view(np.uint8), axis=-1).astype(bool) for d in discs)
    return Boards(black_GT64=black, white_GT64=white, mover_GT=mover_GT), legal


def write_games(
    directory: Path, sizes: dict[str, int], *, seed: int, progress: Callable[[int, int], None] = lambda *_: None
) -> DatasetManifest:
    """Write splits of so many random games as the dataset `directory`, in place of one that an interrupted start left."""
    new_board()  # says if the package is missing before anything is written
    with new_directory(directory, force=True) as temporary:
        (temporary / TOKENIZER).mkdir()
        tokenizer = square_tokenizer()
        tokenizer.save(temporary / TOKENIZER)
        done, splits = 0, {}
        for split, size in sizes.items():
            with IndexedWriter(temporary / split, dtype=token_dtype(VOCABULARY)) as writer:
                for number in range(size):
                    tokens = np.zeros(GAME_TOKENS, dtype=token_dtype(VOCABULARY))
                    moves = random_game(f"{seed}/{split}/{number}")
                    tokens[1 : len(moves) + 1] = moves
                    writer.add(tokens.tobytes(), np.array([GAME_TOKENS], dtype=np.int32))
                    progress(done := done + 1, sum(sizes.values()))
            # A move's name is two bytes, with a blank: what bits per byte refer to.
            splits[split] = SplitInfo(documents=size, tokens=size * GAME_TOKENS, bytes=size * MOVES * 3)
        info = TokenizerInfo(type=tokenizer.type, hash=tokenizer.hash, vocab_size=VOCABULARY, eos_id=PAD)
        total = sum(sizes.values())
        manifest = DatasetManifest(
            tokenizer=info,
            dtype=token_dtype(VOCABULARY),
            splits=splits,
            fractions={split: size / total for split, size in sizes.items()},
            seed=seed,
            documents="game",
            text_key="",
            steerscale_version=steerscale.__version__,
        )
        manifest.write(temporary)
    return manifest


def read_games(directory: Path, split: str, most: int | None = None) -> np.ndarray:
    """Games of a split, int64 [G, GAME_TOKENS]. Raises DataError if there are fewer than `most`."""
    manifest = inspect_dataset(directory)
    games = map_tokens(directory / split, dtype=manifest.dtype).reshape(-1, GAME_TOKENS)
    if most is not None and len(games) < most:
        raise DataError(f"split {split!r} of {directory} has {len(games)} games, fewer than the {most} asked for")
    return games[:most].astype(np.int64)


def square_tokenizer() -> HuggingFaceTokenizer:
    """Text like "f5 d6 c3" <-> tokens, so that `steerscale sample` plays on."""
    vocabulary = {"<game>": PAD, **{NAMES[square]: token for square, token in TOKEN_OF.items()}}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<game>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    model.add_special_tokens(["<game>"])
    settings = {"eos_token": "<game>", "pad_token": "<game>"}
    return HuggingFaceTokenizer(json.dumps(json.loads(model.to_str())).encode(), settings, origin="Othello's squares")
