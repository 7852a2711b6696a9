"""Streams of text tasks: files, rules, batches, decoding, scores, and a stream from end to end."""

from __future__ import annotations

import json
import unicodedata

import pytest
import torch

from cl_plugins import fit_stream
from cl_plugins.byte_tokenizer import ByteTokenizer
from cl_plugins.callbacks import BalancedEMA
from cl_plugins.causal_lm import IGNORED, CausalLM, LanguageModule
from cl_plugins.generation import ExactMatch, answers, greedy_decode, score_answers
from cl_plugins.instruction_groups import InstructionGroups
from cl_plugins.scenarios import InstructionStream, build_scenario
from cl_plugins.scenarios.instruction_rules import RULES, rule_task
from cl_plugins.scenarios.instructions import PromptCollator
from cl_plugins.scenarios.text_data import Example, TextTask, coin_instruction, read_jsonl, read_tasks, task_from_rows
from tests._helpers import quiet_trainer

ROW = {"instruction": "Reverse the word.", "input": "abc", "output": "cba"}


def _sample(instruction="Do it.", text="ab", output="B"):
    return {"instruction": instruction, "input": text, "output": output, "image": "", "label": 0}


# rules


@pytest.mark.parametrize("name", list(RULES))
def test_rules_make_exact_and_separate_examples(name):
    task = rule_task(name, n_train=200, n_test=40, seed=3)
    assert len(task.train) == 200
    assert len(task.test) == 40
    assert len(task.instructions) == 3
    assert all(RULES[name].answer(e.input) == e.output for e in [*task.train, *task.test])
    if not RULES[name].closed:
        assert not {e.input for e in task.train} & {e.input for e in task.test}
    assert rule_task(name, 200, 40, seed=3).train == task.train
    assert rule_task(name, 200, 40, seed=4).train != task.train


@pytest.mark.parametrize(
    ("name", "text", "output"),
    [
        ("upper-case", "tone", "TONE"),
        ("reverse", "tone", "enot"),
        ("sort-letters", "tone", "enot"),
        ("count-vowels", "tone", "2"),
        ("roman", "944", "CMXLIV"),
        ("next-letters", "zone", "apof"),
        ("drop-vowels", "tone", "tn"),
        ("double-letters", "abc", "aabbcc"),
        ("add", "12 + 30", "42"),
        ("character-name", "§", "section sign"),
    ],
)
def test_rules_by_hand(name, text, output):
    assert RULES[name].answer(text) == output


def test_character_names_are_those_of_any_python():
    for character in RULES["character-name"].inputs():
        assert unicodedata.name(character).lower() == RULES["character-name"].answer(character)


@pytest.mark.parametrize("name", RULES)
def test_unseen_wordings_change_the_words_of_the_test_alone(name):
    same, reworded = (rule_task(name, 40, 20, seed=3, test_wordings=w) for w in ("same", "unseen"))
    assert same.train == reworded.train
    assert [(e.input, e.output) for e in same.test] == [(e.input, e.output) for e in reworded.test]
    asked = {e.instruction for e in reworded.test}
    assert asked == set(RULES[name].unseen)
    others = [w for r in RULES.values() for w in r.wordings]
    assert asked.isdisjoint(others)  # not the words of any task's training


def test_unseen_wordings_of_a_stream():
    stream = InstructionStream(["reverse", "add"], n_train=4, n_test=6, test_wordings="unseen")
    assert set(stream.test_instructions(1)) <= set(RULES["add"].unseen)
    assert len(stream.test_instructions(1)) == 6
    assert set(stream.instructions(1)) <= set(RULES["add"].wordings)
    with pytest.raises(ValueError, match="`test_wordings` must be one of same, unseen, got 'new'"):
        InstructionStream(["reverse"], test_wordings="new")
    rows = [Example("Say it.", "", "yes")]
    with pytest.raises(ValueError, match="`test_wordings` must be 'same' for tasks that are no rules, got 'unseen'"):
        InstructionStream([TextTask("a", rows, rows)], test_wordings="unseen")


def test_unknown_rules_are_refused():
    with pytest.raises(ValueError, match="did you mean 'reverse'"):
        rule_task("revers")
    with pytest.raises(ValueError, match="`n_train` must be an integer of 1 or more, got 0"):
        rule_task("reverse", n_train=0)


# files


def _write(path, records, lines=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


def test_jsonl_folders(tmp_path):
    for task in ("b", "a"):
        for split in ("train", "test", "validation"):
            _write(tmp_path / task / f"{split}.jsonl", [ROW, {"instruction": "Ä", "output": 3}])
    tasks = read_tasks(tmp_path)
    assert [t.name for t in tasks] == ["a", "b"]
    assert tasks[0].train == [Example("Reverse the word.", "abc", "cba"), Example("Ä", "", "3")]
    assert len(tasks[0].validation) == 2
    stream = InstructionStream(["b", "a"], root=tmp_path, batch_size=1)
    assert [t.name for t in stream.tasks] == ["b", "a"]
    assert len(stream.val_dataloader()) == 1


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{not json", r"train.jsonl, line 3: must be a JSON object, got .* at column 2"),
        ("[1]", r"line 3: must be an object with the key 'instruction', got list"),
        ('{"instruction": "x"}', r"line 3: must have the key 'output', got \['instruction'\]"),
        ('{"instrction": "x", "output": "y"}', "line 3: must have the key 'instruction'.*did you mean 'instrction'"),
        ('{"instruction": " ", "output": "y"}', "line 3: the instruction must not be empty"),
        ('{"instruction": "x", "output": ""}', "line 3: the output must not be empty"),
        ('{"instruction": "x", "output": ["y"]}', r"line 3: 'output' must be text, got \['y'\]"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, text):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(ROW) + "\n\n" + line + "\n")
    with pytest.raises(ValueError, match=text):
        read_jsonl(path)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there must be a file .*nothing.jsonl"):
        read_jsonl(tmp_path / "nothing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one example"):
        read_jsonl(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"instruction": "\xe9"}')
    with pytest.raises(ValueError, match="must be UTF-8, got byte 17"):
        read_jsonl(tmp_path / "latin.jsonl")
    with pytest.raises(FileNotFoundError, match="must be a folder with one folder per task"):
        read_tasks(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`format` must be one of jsonl, coin, trace, got 'csv'"):
        read_tasks(tmp_path, format="csv")
    _write(tmp_path / "sums" / "train.jsonl", [ROW])
    with pytest.raises(ValueError, match="did you mean 'sums'"):
        read_tasks(tmp_path, ["sum"])
    with pytest.raises(FileNotFoundError, match=r"sums.test.jsonl"):
        read_tasks(tmp_path)


def test_trace_files(tmp_path):
    rows = [{"prompt": "Judge the sentence.\nRates rise.", "answer": "A"}, {"prompt": "Add. 1 + 1", "answer": 2}]
    for split in ("train", "test", "eval"):
        _write(tmp_path / "FOMC" / f"{split}.json", rows, lines=False)
    (task,) = read_tasks(tmp_path, format="trace")
    assert task.train == [Example("Judge the sentence.", "Rates rise.", "A"), Example("Add.", "1 + 1", "2")]
    assert task.validation == task.train
    _write(tmp_path / "FOMC" / "train.json", [*rows, {"prompt": "x"}], lines=False)
    with pytest.raises(ValueError, match=r"train.json, record 3: must have the key 'answer'"):
        read_tasks(tmp_path, format="trace")
    (tmp_path / "FOMC" / "train.json").write_text('[\n{"prompt": }]')
    with pytest.raises(ValueError, match=r"train.json, line 2: must be JSON"):
        read_tasks(tmp_path, format="trace")
    (tmp_path / "FOMC" / "train.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a list of examples, got dict"):
        read_tasks(tmp_path, format="trace")


def test_coin_files(tmp_path):
    question = "<image>\nWhat is it?\nAnswer with one word."
    train = [
        {"image": "a.png", "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "cat"}]}
    ]
    test = [{"question_id": 1, "image": "b.png", "text": "What is it?\nAnswer with one word.", "answer": "dog"}]
    _write(tmp_path / "GQA" / "train.json", train, lines=False)
    _write(tmp_path / "GQA" / "test.json", test, lines=False)
    (task,) = read_tasks(tmp_path, format="coin")
    assert task.train == [Example("Answer with one word.", "What is it?", "cat", "a.png")]
    assert task.test == [Example("Answer with one word.", "What is it?", "dog", "b.png")]
    train[0]["conversations"] = []
    _write(tmp_path / "GQA" / "train.json", train, lines=False)
    with pytest.raises(ValueError, match=r"record 1: 'conversations' must hold a question and an answer, got \[\]"):
        read_tasks(tmp_path, format="coin")


def test_coin_instructions_by_task():
    assert coin_instruction("Locate the region: red car", "Grounding") == ("Locate the region", "red car")
    for image in ("", "<image>\n"):  # as in the test and in the training file
        told = coin_instruction(f"{image}What is the object in the image?\nAnswer with a word.", "ImageNet")
        assert told == ("What is the object in the image?", "Answer with a word.")


def test_rows_of_other_libraries():
    rows = [{"question": "1 + 1", "answer": 2}]
    task = task_from_rows("sums", {"train": rows, "test": rows}, {"input": "question", "output": "answer"}, "Add.")
    assert task.train == [Example("Add.", "1 + 1", "2")]
    with pytest.raises(ValueError, match="`splits` of 'sums' must have 'test'"):
        task_from_rows("sums", {"train": rows})
    with pytest.raises(ValueError, match="sums, train, row 1: must have the key 'instruction'"):
        task_from_rows("sums", {"train": rows, "test": rows})


def test_faulty_streams_are_refused():
    task = TextTask("a", [Example(**ROW)], [Example(**ROW)])
    with pytest.raises(ValueError, match="`tasks` must have distinct names, got 'a' twice"):
        InstructionStream([task, task])
    with pytest.raises(ValueError, match="`test` of text task 'b' must hold at least one example"):
        TextTask("b", [Example(**ROW)], [])
    with pytest.raises(ValueError, match="`tasks` must hold at least one task"):
        InstructionStream([])
    with pytest.raises(ValueError, match="give one of the two"):
        InstructionStream([task], root="somewhere")


# batches


def test_only_answers_carry_a_loss():
    tokenizer = ByteTokenizer()
    batch = PromptCollator(tokenizer)([_sample(), _sample("Do it now.", "", "Ü")])
    for row in range(2):
        labels = batch["labels"][row]
        answer = ("B", "Ü")[row]
        assert labels[labels != IGNORED].tolist() == [*tokenizer.encode(answer), tokenizer.eos_id]
        same = labels != IGNORED
        assert torch.equal(batch["input_ids"][row][same], labels[same])
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        assert tokenizer.decode(prompt.tolist()) == ("Do it.\nab\n", "Do it now.\n")[row]
    assert batch["prompt_mask"][:, -1].tolist() == [1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [13, 15]


def test_long_prompts_lose_their_beginning():
    batch = PromptCollator(ByteTokenizer(), max_tokens=6)([_sample("Long instruction.", "xyz", "A")])
    assert ByteTokenizer().decode(batch["prompt_ids"][0].tolist()) == "xyz\n"
    with pytest.raises(ValueError, match="`max_tokens` must exceed the longest answer, 6 tokens, got 6"):
        PromptCollator(ByteTokenizer(), max_tokens=6)([_sample(output="ABCDE")])


def test_workers_and_orders_give_the_same_batches():
    plain = InstructionStream(["reverse"], n_train=12, n_test=3, batch_size=4)
    workers = InstructionStream(["reverse"], n_train=12, n_test=3, batch_size=4, num_workers=1)
    first = [b["outputs"] for b in plain.train_dataloader()]
    assert first == [b["outputs"] for b in workers.train_dataloader()]
    shuffled = InstructionStream(["reverse", "add", "roman"], n_train=4, n_test=2, order_seed=3)
    assert [t.name for t in shuffled.tasks] == ["roman", "add", "reverse"]


# the model and its answers


def test_causal_and_padding_invariant():
    model = CausalLM(vocab_size=20, dim=16, depth=2, heads=2).eval()
    ids = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    whole = model(ids).logits
    torch.testing.assert_close(model(ids[:, :4]).logits, whole[:, :4])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), torch.ones_like(ids)], 1)
    torch.testing.assert_close(model(padded, mask).logits[:, 3:], whole, rtol=1e-4, atol=1e-5)


def test_cache_gives_the_same_logits():
    model = CausalLM(vocab_size=20, dim=16, depth=2, heads=2).eval()
    ids = torch.arange(6)[None]
    first = model(ids[:, :4], use_cache=True)
    rest = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, model(ids).logits[:, 4:])


def test_loss_is_that_of_shifted_tokens():
    model = CausalLM(vocab_size=20, dim=16, depth=1, heads=2)
    ids = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4]])
    output = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(output.logits[0, 1:3], torch.tensor([3, 4]))
    torch.testing.assert_close(output.loss, expected)


def test_initialization_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = CausalLM(dim=16, depth=1, heads=2, seed=7), CausalLM(dim=16, depth=1, heads=2, seed=7)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    with pytest.raises(ValueError, match="`dim` must be divisible by 2 \\* heads = 8, got 12"):
        CausalLM(dim=12, heads=4)


def test_greedy_decoding_equals_decoding_one_by_one():
    model = CausalLM(vocab_size=259, dim=16, depth=2, heads=2, seed=3).eval()
    with torch.no_grad():
        model.embed.weight.mul_(20)  # sharp logits, so that rounding decides nothing
    batch = PromptCollator(ByteTokenizer())([_sample(), _sample("A longer instruction.", "word", "x")])
    together = greedy_decode(model, batch["prompt_ids"], batch["prompt_mask"], 5, eos_id=258)
    for row in range(2):
        ids = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()][None]
        for step in range(5):
            token = model(ids).logits[0, -1].argmax()
            assert token == together[row, step]
            if token == 258:
                break
            ids = torch.cat([ids, token.reshape(1, 1)], 1)


def test_decoding_stops_at_the_end_token_and_refuses_right_padding():
    class Ends(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, **_):
            calls = 0 if past_key_values is None else past_key_values
            logits = torch.zeros(len(input_ids), 1, 259)
            logits[0, 0, 258 if calls else 65] = 1
            logits[1, 0, 66 if calls < 2 else 258] = 1
            return type("Output", (), {"logits": logits, "past_key_values": calls + 1})

    batch = PromptCollator(ByteTokenizer())([_sample(), _sample()])
    made = greedy_decode(Ends(), batch["prompt_ids"], batch["prompt_mask"], 20, eos_id=258)
    assert made.tolist() == [[65, 258, 258, 258], [66, 66, 258, 258]]
    assert answers(Ends(), batch, ByteTokenizer(), 20) == ["A", "BB"]
    assert score_answers(Ends(), [batch], ByteTokenizer(), 20) == {"exact_match": 0.0, "rouge_l": 0.0, "n": 2.0}
    with pytest.raises(ValueError, match="must be padded on the left"):
        greedy_decode(Ends(), batch["prompt_ids"], batch["prompt_mask"] * 0, 5, eos_id=258)
    with pytest.raises(ValueError, match="`max_new_tokens` must be 1 or more"):
        greedy_decode(Ends(), batch["prompt_ids"], batch["prompt_mask"], 0, eos_id=258)


def test_exact_match_is_a_metric():
    metric = ExactMatch()
    metric.update(["a", "b "], ["a", "b"])
    metric.update(["A"], ["a"])
    assert float(metric.compute()) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="`preds` must be as many as `target`, 1, got 2"):
        metric.update(["a", "b"], ["a"])


# from end to end


def test_a_model_learns_a_task_and_its_answers_are_counted():
    rows = [Example("Say it.", "", "yes")] * 16
    other = [Example("Say the other.", "", "no")] * 16
    stream = InstructionStream([TextTask("yes", rows, rows[:4]), TextTask("no", other, other[:4])], batch_size=4)
    module = LanguageModule(CausalLM(dim=32, depth=1, heads=2), lr=5e-3)
    result = fit_stream(quiet_trainer(max_epochs=8, callbacks=[BalancedEMA("fixed", decay=0.5)]), module, stream)
    assert result.correct.tolist()[0] == [4, -1]
    assert result.correct.tolist()[1][1] == 4
    assert result.total.tolist()[1] == [4, 4]
    assert module.model(torch.zeros(1, 1, dtype=torch.long)).logits.shape == (1, 1, 259)


def test_the_registered_scenario_groups_by_instruction():
    stream = build_scenario("instructions", n_train=6, n_test=2, order_seed=None)
    assert [t.name for t in stream.tasks][:2] == ["upper-case", "next-letters"]
    groups = InstructionGroups(threshold=0.9)
    for index, task in enumerate(stream.tasks):
        groups.commit(groups.match(stream.instructions(index)), task.name)
    assert groups.allocate_samples(stream.instructions(2)) == [groups.history[2]["group"]] * len(stream.instructions(2))
    assert stream.provenance()["texts"][0]["name"] == "upper-case"
    json.dumps(stream.provenance())
