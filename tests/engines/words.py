"""A tokenizer of as many words as tiny models have rows, and a server to wait for."""

from __future__ import annotations

import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word(token: int) -> str:
    """The word of a token."""
    return f"w{token:03}"


def tokenizer_of_words(number: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token 17 is the word `w017`: no word, such as that of the end, begins another."""
    words = Tokenizer(models.WordLevel({word(each): each for each in range(number)}, unk_token=word(0)))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=word(0), pad_token=word(0), eos_token=word(2))


@contextmanager
def server(command: list[str], log: Path, environment: Mapping[str, str], seconds: float = 300) -> Iterator[str]:
    """Runs a server at a free port, which is told it as its last arguments; the address of its API, once it is up."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, env=dict(environment)) as process:
        try:
            deadline = time.monotonic() + seconds
            while not _is_up(port):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
