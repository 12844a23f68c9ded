"""The data position: whatever the moments at which a run stops, no example is lost and none comes twice."""

import json
import random
from collections import Counter
from dataclasses import replace

from r1mega.config import RunConfig, SFTConfig
from r1mega.data.prompts import PromptStream
from r1mega.samples import Prompt
from r1mega.stages.supervised import batches

PROMPTS = [Prompt(f"q{n}", f"{n}+1", str(n + 1), "math", f"{n}+1", (n,)) for n in range(37)]


def test_a_prompt_stream_saved_at_random_moments_asks_every_question_once_an_epoch():
    rng = random.Random()
    stream, asked = PromptStream(PROMPTS, seed=3), []
    while len(asked) < 4 * len(PROMPTS):
        saved = json.loads(json.dumps(stream.state()))
        for _ in range(rng.randrange(4)):  # work that a kill undoes
            stream.take(5)
        stream = PromptStream(PROMPTS, seed=3).restore(saved)
        asked += [prompt.id for prompt in stream.take(5)]
    for epoch in range(4):
        counts = Counter(asked[epoch * len(PROMPTS) : (epoch + 1) * len(PROMPTS)])
        assert set(counts.values()) == {1}
        assert len(counts) == len(PROMPTS)


def test_supervised_batches_resumed_anywhere_are_those_of_the_whole_run():
    documents = list(range(53))
    config = replace(RunConfig(), stage="sft", num_steps=40, sft=SFTConfig(batch_size=4))
    whole = list(batches(documents, config, first_step=0))
    for step in range(40):
        assert next(batches(documents, config, first_step=step)) == whole[step]
    per_epoch = len(documents) // 4
    for epoch in range(3):
        seen = [item for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch] for item in batch]
        assert len(set(seen)) == len(seen) == per_epoch * 4
