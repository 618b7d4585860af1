"""The text that the toy checkpoint's tokenizer learns its pieces from.

Moshi's 32,000 pieces hold nearly every spoken word whole, and a word whose pieces outnumber its frames is cut off in
the text stream. So the toy learns from the conversations that :mod:`inlay.data.speech` makes, beside other sentences.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from inlay.data.speech_dialogue import Dialogue

_DIALOGUES, _EXCHANGES = 40, 25

_SENTENCES = (
    "hello, good morning, how are you today?",
    "I am very well, thank you, and how was your journey?",
    "the train was late again, so I walked along the river for an hour",
    "could you tell me the name and the number once more, please?",
    "yes, of course, I will write it down and say it slowly",
    "my brother works in the garden behind the old school",
    "we went to the market on Monday and bought bread, cheese and apples",
    "what did the doctor say about the medicine and the cold weather?",
    "please remember the word that I told you at the beginning",
    "I remember it, you said it before we talked about the mountains",
    "one two three four five six seven eight nine ten eleven twelve twenty thirty",
    "red green blue yellow white black silver golden orange purple",
    "the meeting starts at half past three in the room next to the kitchen",
    "she left the key on the table and the letter under the window",
    "there is a small house by the lake where nobody has lived for years",
    "that sounds lovely, tell me more about the boat and the bridge",
    "it rained all night, and in the morning the street was full of water",
    "our teacher asked a question which nobody in the class could answer",
    "do you still have the photograph of the winter in the village?",
    "the answer is always the same, but the way to it is different",
    "first we cook the rice, then we add some salt, pepper and lemon",
    "I would like to speak with somebody about a ticket for tomorrow evening",
    "quick brown foxes jump over lazy dogs, extra vowels make jazz puzzling",
    "see you later, goodbye, and take care of yourself",
)


def toy_text() -> Iterator[str]:
    """Sentences, the same ones each time."""
    yield from _SENTENCES
    for seed in range(_DIALOGUES):
        dialogue = Dialogue(np.random.default_rng(seed), return_after=0)
        for now in range(_EXCHANGES):
            for turn in dialogue.exchange(now):
                yield " ".join(turn.words)
                if turn.fact is not None:
                    dialogue.note_said(turn.fact, now)
