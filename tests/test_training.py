"""The training mathematics: loss, packing, LoRA files."""

import json
from argparse import Namespace
from itertools import product
from pathlib import Path

import pytest
import torch
from bench import in_fresh_process, peak_memory
from bench_train import loss_peak
from conftest import build_model

import train
from base.errors import UserError
from data.packing import Example, epoch_order, group, micro_batches, pack, plan_steps
from data.rows import read_rows, write_rows
from model import lora, weights
from model.attention import Packed
from model.chat import Chat
from model.config import PROJECTIONS
from model.decoder import Decoder, Linear, RMSNorm, _SwiGLU, linear
from model.loss import CHUNK, chunked_nll, nll_reference
from model.memory import training_memory

CPU = torch.device("cpu")


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def adapted_model(folder: Path, scale: float = 0.1, **settings: object) -> tuple[Decoder, lora.LoRAConfig]:
    model = weights.load(folder, CPU, torch.float32)
    config = lora.LoRAConfig(**{"rank": 4, "alpha": 8.0} | settings)
    lora.attach(model, config, seed=1)
    generator = torch.Generator().manual_seed(2)
    for adapter in lora.adapted(model).values():
        adapter.lora_B.data.normal_(0, scale, generator=generator)
    return model, config


def examples(vocab: int, count: int = 8) -> list[Example]:
    generator = torch.Generator().manual_seed(4)
    made = []
    for i in range(count):
        length = int(torch.randint(6, 60, (1,), generator=generator))
        tokens = torch.randint(vocab, (length,), generator=generator).tolist()
        first, last = 1 + i % 4, length - i % 2
        cut = (first + last) // 2
        # every other one with two responses
        made.append(Example(str(i), tokens, ((first, last),) if i % 2 else ((first, cut - 1), (cut, last))))
    return made


@torch.no_grad()
def logits_of(model: Decoder, tokens: list[int]) -> torch.Tensor:
    return model.logits(model(torch.tensor(tokens), torch.arange(len(tokens)), Packed([len(tokens)])))


def gradients(model: Decoder, batches: list[list[Example]], prompt_weight: float = 0.0
              ) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients of one optimiser step over these micro-batches."""
    model.zero_grad()
    total = sum(example.weight(prompt_weight) for batch in batches for example in batch)
    loss = 0.0
    for batch in batches:
        nll = train.summed_nll(model, batch, prompt_weight) / total
        nll.backward()
        loss += nll.item()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return loss, {name: parameter.grad.clone() for name, parameter in trained.items()}


@pytest.mark.parametrize("vocab", [300, 151_936])
def test_chunked_loss_equals_the_plain_one(vocab: int) -> None:
    torch.manual_seed(0)
    count = CHUNK + 44  # a whole chunk and a part
    hidden, weight = torch.randn(count, 16, requires_grad=True), torch.randn(vocab, 16, requires_grad=True)
    targets, token_weights = torch.randint(vocab, (count,)), torch.rand(count)
    found = []
    for loss in (chunked_nll, nll_reference):
        value = loss(hidden, weight, targets, token_weights)
        found.append((value.detach(), *torch.autograd.grad(0.3 * value, (hidden, weight))))
    for ours, theirs in zip(*found, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_chunked_loss_is_summed_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    targets, token_weights = torch.randint(300, (1000,)), torch.rand(1000)
    with torch.autocast("cpu", torch.bfloat16):
        ours = chunked_nll(hidden, weight, targets, token_weights)
    theirs = nll_reference(hidden, weight, targets, token_weights)
    assert ours.dtype == torch.float32 and relative(ours, theirs) < 1e-5


def test_the_loss_takes_no_memory_by_the_vocabulary() -> None:
    """Peak memory of a process, 256 and 4,096 tokens at a vocabulary of 152k: by far less than a row of logits each."""
    peaks = [in_fresh_process(loss_peak, count, 64) for count in (256, 4096)]
    # one chunk's logits, 156 MB, and never two
    assert (peaks[1] - peaks[0]) / (4096 - 256) < 4 * 151_936 / 50


def test_new_numbers_of_tokens_take_little_memory() -> None:
    """oneDNN's compiled products of 200 further shapes: let go of again, where 1,024 used to be kept, 0.7 MB each."""
    assert in_fresh_process(growth_by_shapes) < 40e6


@torch.no_grad()  # in training too it is within autograd functions that oneDNN multiplies
def growth_by_shapes() -> int:
    """What 200 products by as many numbers of tokens add to a process's memory."""
    weight = torch.randn(96, 64)
    for tokens in range(100, 400):
        linear(torch.randn(tokens, 64), weight)
        if tokens == 200:
            before = peak_memory()
    return peak_memory() - before


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    chunked_nll(hidden, weight, torch.arange(5), torch.ones(5)).backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("shared", [0, 12])
@pytest.mark.parametrize("prompt_weight", [0.0, 0.1])
def test_packed_gradients_equal_one_at_a_time(prompt_weight: float, shared: int, tiny: Path) -> None:
    """1 × 8 packed, 8 × 1 accumulated, and 3 + 5: the same loss and the same gradients; also where all begin alike."""
    model, _ = adapted_model(tiny)
    rows = examples(model.config.vocab_size)
    beginning = list(range(shared))
    rows = [Example(row.id, beginning + row.tokens, tuple((first + shared, last + shared) for first, last in row.spans))
            for row in rows]
    assert pack(rows, CPU).shared == shared
    assert len(pack(rows, CPU).tokens) == sum(len(row.tokens) for row in rows) - 7 * shared
    assert len({row.supervised for row in rows}) > 4  # unequal lengths: where a mean of means would go wrong
    loss, expected = gradients(model, [[row] for row in rows], prompt_weight)
    for batches in ([rows], [rows[:3], rows[3:]], [rows[::-1]]):
        packed_loss, packed = gradients(model, batches, prompt_weight)
        assert abs(packed_loss - loss) < 1e-5 * loss
        assert all(relative(packed[name], expected[name]) < 1e-5 for name in expected)


def test_targets_are_the_supervised_tokens(tiny: Path) -> None:
    rows = [Example("a", [5, 6, 7, 8], ((2, 4),)), Example("b", [9, 10, 11], ((1, 2),))]
    batch = pack(rows, CPU)
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.targets.tolist() == [7, 8, 10]
    assert batch.sources.tolist() == [1, 2, 4]  # each predicted from the token before it
    assert batch.token_weights.tolist() == [1, 1, 1] == [1.0] * sum(row.supervised for row in rows)
    batch = pack(rows, CPU, prompt_weight=0.5)
    assert batch.targets.tolist() == [6, 7, 8, 10, 11]  # all but the first of each, which nothing predicts
    assert batch.token_weights.tolist() == [0.5, 1, 1, 1, 0.5]
    assert batch.token_weights.sum() == sum(row.weight(0.5) for row in rows)


def test_a_common_beginning_is_in_the_stream_once() -> None:
    common = list(range(10, 20))
    rows = [Example("a", [*common, 5, 6], ((11, 12),)), Example("b", [*common, 7], ((10, 11),)),
            Example("c", [*common, 8, 9, 1], ((9, 10), (12, 13)))]  # c's response begins within it
    batch = pack(rows, CPU)
    assert batch.shared == 10 and batch.lengths == [12, 1, 3]
    assert batch.tokens.tolist() == [*common, 5, 6, 7, 8, 9, 1]
    assert batch.positions.tolist() == [*range(12), 10, 10, 11, 12]
    assert batch.targets.tolist() == [6, 7, 19, 1]
    assert batch.sources.tolist() == [10, 9, 8, 14]
    assert pack([rows[0], Example("d", common, ((9, 10),))], CPU).shared == 9  # each keeps a token of its own
    assert pack(rows[:1], CPU).shared == 0 == pack([*rows, Example("e", [1, 2], ((1, 2),))], CPU).shared


def test_prompt_loss_weight_weighs_the_prompt(tiny: Path) -> None:
    """The step's loss is the mean over tokens, those outside responses weighing w, computed by the book."""
    model, _ = adapted_model(tiny)
    rows = examples(model.config.vocab_size)
    expected, total = 0.0, 0.0
    for row in rows:
        nll = -logits_of(model, row.tokens)[:-1].log_softmax(-1).gather(1, torch.tensor(row.tokens)[1:, None])[:, 0]
        inside = [any(first <= place < last for first, last in row.spans) for place in range(1, len(row.tokens))]
        weight = torch.tensor([1.0 if supervised else 0.3 for supervised in inside])
        expected, total = expected + (weight * nll).sum().item(), total + weight.sum().item()
    assert gradients(model, [rows], 0.3)[0] == pytest.approx(expected / total, rel=1e-5)


def test_muon_is_for_the_matrices_of_the_blocks(tiny: Path) -> None:
    model = weights.initialise(tiny, CPU, seed=1).requires_grad_(True)
    parameters = dict(model.named_parameters())
    adamw, muon = train.make_optimizers(Namespace(optimizer="muon", weight_decay=0.0), parameters)
    owned = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    by_muon = {name for name, parameter in parameters.items() if id(parameter) in owned}
    assert by_muon == {name for name in parameters if name.startswith("layers.") and "proj" in name}
    assert len(by_muon) + sum(len(group["params"]) for group in adamw.param_groups) == len(parameters)


@pytest.mark.parametrize("fixture", ["tiny", "tiny_teacher"])
def test_random_weights_are_what_the_config_says(fixture: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(fixture)
    model, same, other = (weights.initialise(folder, CPU, seed) for seed in (1, 1, 2))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, same.get_parameter(name))
        if parameter.ndim == 2:  # conftest's initializer_range
            assert parameter.std().item() == pytest.approx(0.3, rel=0.1)
            assert not torch.equal(parameter, other.get_parameter(name))
        else:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0))
    assert any(name.endswith("bias") for name in parameters) == (fixture == "tiny_teacher")


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_order(50, 1, 0) == epoch_order(50, 1, 0)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    lengths = [10 + i % 7 for i in range(50)]
    flat = [[i for step in plan_steps(lengths, budget, seed=1, epochs=2) for i in step] for budget in (10, 64, 10_000)]
    assert flat[0] == flat[1] == flat[2] == epoch_order(50, 1, 0) + epoch_order(50, 1, 1)


def test_steps_and_budget() -> None:
    lengths = [30, 30, 30, 200, 5]
    assert list(group(range(5), lengths, 64)) == [[0, 1], [2], [3], [4]]
    assert len(plan_steps(lengths, 64, seed=0, steps=13)) == 13
    for step in plan_steps(lengths, 64, seed=0, epochs=3):
        assert sum(lengths[i] for i in step) <= 64 or len(step) == 1


def test_micro_batches_hold_a_step_in_few_passes() -> None:
    sizes = [30, 60, 70, 40, 200, 5, 25]
    rows = [Example(str(i), [0] * size, ()) for i, size in enumerate(sizes)]
    parts = [[len(row.tokens) for row in part] for part in micro_batches(rows, 100)]
    assert parts == [[200], [30, 70], [60, 40], [5, 25]]
    assert len(list(group(range(7), sizes, 100))) == 5  # in order


def test_a_long_conversation_checkpoints_what_is_beyond_the_budget(tiny: Path, monkeypatch: pytest.MonkeyPatch
                                                                   ) -> None:
    """As many blocks as it takes for the others to keep no more than the budget's tokens would; the same gradients."""
    model, _ = adapted_model(tiny)
    long, short = (Example("a", [1] * size, ((3, size),)) for size in (400, 100))
    assert [train.checkpointed_blocks(model, len(row.tokens), 100, False) for row in (short, long)] == [0, 2]
    assert [train.checkpointed_blocks(model, len(row.tokens), 200, False) for row in (short, long)] == [0, 1]
    assert train.checkpointed_blocks(model, len(short.tokens), 200, True) == 2
    results, used, summed_nll = [], [], train.summed_nll

    def noting(model: Decoder, *arguments: object) -> torch.Tensor:
        used.append(model.checkpointed)
        return summed_nll(model, *arguments)

    monkeypatch.setattr(train, "summed_nll", noting)
    for budget in (100, 200, 400):
        model.zero_grad()
        loss = train.add_gradients(model, [short, long], budget)
        results.append((loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()
                               if parameter.requires_grad}))
    train.add_gradients(model, [short], 400, checkpoint_activations=True)
    assert used == [2, 0, 1, 0, 0, 0, 2]
    for loss, grads in results[:2]:
        assert abs(loss - results[2][0]) < 1e-6 * loss
        assert all(relative(grads[name], results[2][1][name]) < 1e-5 for name in grads)


def test_matrices_as_the_file_has_them(tiny: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """A bfloat16 file trained in float32 from half of the memory: loss and gradients to the bit; tied or not."""
    for i, (folder, targets) in enumerate(product((tiny, tiny_teacher), (PROJECTIONS, ("q_proj", "v_proj")))):
        weights.save(weights.load(folder, CPU, torch.float32), folder, tmp_path / str(i), torch.bfloat16)
        found, kept = [], []
        for narrow in (False, True):
            model = weights.load(tmp_path / str(i), CPU, torch.float32, narrow=narrow)
            assert model.dtype == torch.float32
            dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
            head = "embed_tokens.weight" if model.config.tied else "lm_head.weight"
            assert all((dtypes[name] == torch.bfloat16) == (narrow and parameter.ndim == 2 and name != head)
                       for name, parameter in model.named_parameters())
            lora.attach(model, lora.LoRAConfig(rank=4, targets=targets), seed=1)
            for adapter in lora.adapted(model).values():
                adapter.lora_B.data.fill_(0.01)
            found.append(gradients(model, [examples(model.config.vocab_size)]))
            kept.append(kept_by_autograd(model, 40))
        assert kept[0] == kept[1]  # no widened matrix is
        assert found[0][0] == found[1][0]
        assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


def test_new_adapter_changes_nothing_and_detach_restores(tiny: Path) -> None:
    model = weights.load(tiny, CPU, torch.float32)
    tokens = list(range(20))
    before = logits_of(model, tokens)
    lora.attach(model, lora.LoRAConfig(rank=4))
    assert torch.equal(logits_of(model, tokens), before)
    lora.detach(model)
    adapted, _ = adapted_model(tiny)
    assert not torch.allclose(logits_of(adapted, tokens), before)
    lora.detach(adapted)
    assert torch.equal(logits_of(adapted, tokens), before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapted_product_equals_autograd(bias: bool, dtype: torch.dtype) -> None:
    """Value and gradients of `LoRALinear` against its formula, which it computes where no gradient is wanted."""
    torch.manual_seed(0)
    base = Linear(24, 40, bias=bias, dtype=dtype)
    torch.nn.init.normal_(base.weight)
    if bias:
        torch.nn.init.normal_(base.bias)
    layer = lora.LoRALinear(base.requires_grad_(False), 4, 0.7, 0.0)
    torch.nn.init.normal_(layer.lora_A)
    torch.nn.init.normal_(layer.lora_B)
    x, direction = torch.randn(9, 24, dtype=dtype, requires_grad=True), torch.randn(9, 40, dtype=dtype)
    inputs = (x, layer.lora_A, layer.lora_B)

    def formula(x: torch.Tensor) -> torch.Tensor:
        low = x @ layer.lora_A.to(dtype).T
        return x @ base.weight.T + (base.bias if bias else 0) + (low * 0.7) @ layer.lora_B.to(dtype).T

    found = layer(x), *torch.autograd.grad(layer(x), inputs, direction)
    expected = formula(x), *torch.autograd.grad(formula(x), inputs, direction)
    with torch.no_grad():
        assert relative(layer(x), expected[0]) < (1e-6 if dtype == torch.float32 else 1e-2)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert base.weight.grad is None


def test_swiglu_equals_autograd() -> None:
    torch.manual_seed(0)
    gate, up, direction = (torch.randn(9, 24, dtype=torch.float64, requires_grad=True) for _ in range(3))
    expected = torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), direction)
    for ours, theirs in zip(torch.autograd.grad(_SwiGLU.apply(gate, up), (gate, up), direction), expected, strict=True):
        assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_gradients_equal_autograds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, x = RMSNorm(24, 1e-5).to(dtype), (3 * torch.randn(5, 4, 24)).to(dtype).requires_grad_()
    norm.weight.data.normal_(1, 0.5)
    direction = torch.randn(5, 4, 24).to(dtype)
    normed = norm.weight * (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    found, expected = (torch.autograd.grad(out, (x, norm.weight), direction) for out in (norm(x), normed))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert relative(ours.float(), theirs.float()) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        assert torch.equal(norm(x), normed)  # sampling, which keeps nothing for a gradient


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointed_equals_not(dropout: float, tiny: Path) -> None:
    """Blocks that are computed again for their gradient, all or some: the same to the bit, dropout included."""
    model, _ = adapted_model(tiny, dropout=dropout)
    model.train()
    rows = examples(model.config.vocab_size)
    found = []
    for checkpointed in (0, 1, model.config.num_layers):
        model.checkpointed = checkpointed
        torch.manual_seed(3)
        found.append(gradients(model, [rows[:5], rows[5:]]))
    for loss, grads in found[1:]:
        assert loss == found[0][0]
        assert all(torch.equal(grads[name], found[0][1][name]) for name in grads)


def kept_by_autograd(model: Decoder, tokens: int, shared: int = 0) -> int:
    """Bytes that a forward pass over two sequences of so many tokens keeps for the gradient, but for parameters."""
    kept = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.arange(tokens) % 50, torch.arange(tokens), Packed([tokens // 2 + 10, tokens // 2 - 10], shared))
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("case", ["plain", "shared", "checkpointed", "first", "dropout", "Qwen3", "full"])
def test_memory_on_paper_is_what_autograd_keeps(case: str, tiny: Path, tmp_path: Path) -> None:
    if case == "Qwen3":
        build_model(tiny := tmp_path, "Qwen3")
    model, _ = adapted_model(tiny, dropout=0.3 if case == "dropout" else 0.0)
    model.train()
    model.checkpointed = {"checkpointed": model.config.num_layers, "first": 1}.get(case, 0)
    if case == "full":
        lora.detach(model)
        model.requires_grad_(True)
    found = kept_by_autograd(model, 200, shared=20 if case == "shared" else 0) / 200
    config = model.config
    on_paper = training_memory(model, 1, torch.float32)["activations"]
    model.checkpointed = 0
    block = training_memory(model, 1, torch.float32)["activations"] / (config.num_layers + 1)
    if case == "checkpointed":  # the blocks' inputs; the paper adds the block that is computed again
        inputs = 4 * config.hidden_size * config.num_layers
        assert inputs <= found < 1.5 * inputs + 400 and on_paper > inputs
    else:
        assert 0.85 < found / (on_paper - block) < 1.2  # `block`: of the one whose gradient is being computed


def test_losses_of_twenty_steps_equal_pefts(tiny: Path, tmp_path: Path) -> None:
    """train.py, and a plain loop over transformers and PEFT, row by row: same rows, order, adapter, AdamW, clipping."""
    import transformers
    from peft import PeftModel

    model, config = adapted_model(tiny)
    lora.save(model, config, tmp_path / "start", str(tiny))
    write_rows(tmp_path / "rows.jsonl", [{"id": str(i), "prompt": f"question {i}",
                                          "response": f"answer {i} " * (1 + i % 5)} for i in range(20)])
    options = ("--adapter", tmp_path / "start", "--schedule", "constant", "--warmup", 0, "--steps", 20, "--lr", 1e-2,
               "--batch-tokens", 100, "--micro-batch-tokens", 60, "--seed", 3, "--device", "cpu")
    train.main([str(word) for word in ("--model", tiny, "--data", tmp_path / "rows.jsonl", *options,
                                       "--out", tmp_path / "out")])
    ours = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]

    theirs = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
                                       tmp_path / "start", is_trainable=True)
    chat, rows = Chat(tiny, model.config), []
    for row in read_rows(tmp_path / "rows.jsonl"):
        turn = chat.turn(row["prompt"], row["response"])
        rows.append((turn.tokens, [-100] * turn.first + turn.tokens[turn.first : turn.last]
                     + [-100] * (len(turn.tokens) - turn.last)))
    parameters = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), []
    for step in plan_steps([len(tokens) for tokens, _ in rows], 100, seed=3, steps=20):
        optimizer.zero_grad()
        total, loss = sum(label >= 0 for i in step for label in rows[i][1]), 0.0
        for tokens, labels in (rows[i] for i in step):
            count = sum(label >= 0 for label in labels)
            mean = theirs(input_ids=torch.tensor([tokens]), labels=torch.tensor([labels])).loss
            (mean * count / total).backward()
            loss += mean.item() * count / total
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < 0.8 * losses[0]
    assert ours == pytest.approx(losses, rel=1e-3)


def test_loss_without_gradients_makes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in validation, where the head's gradient would be the largest tensor of all."""
    made = []
    monkeypatch.setattr("torch.zeros_like", lambda tensor: made.append(tensor.shape))
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.no_grad():
        chunked_nll(hidden, weight, torch.arange(5), torch.ones(5))
    assert not made


def test_dropout_only_in_training(tiny: Path) -> None:
    model, _ = adapted_model(tiny, dropout=0.5)
    tokens = list(range(20))
    assert torch.equal(logits_of(model.eval(), tokens), logits_of(model, tokens))
    assert not torch.equal(logits_of(model.train(), tokens), logits_of(model, tokens))


@pytest.mark.parametrize("targets", [lora.PROJECTIONS, ("q_proj", "v_proj"), ("down_proj",)])
def test_our_adapter_in_peft(targets: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    model, config = adapted_model(tiny, targets=targets)
    lora.save(model, config, tmp_path, str(tiny))
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    tokens = list(range(40, 80))
    with torch.no_grad():
        assert relative(logits_of(model, tokens), theirs(torch.tensor([tokens])).logits[0]) < 1e-5


PEFT_SETTINGS = {
    "all": {"target_modules": "all-linear"},
    "two": {"target_modules": ["q_proj", "up_proj"]},
    "pattern": {"target_modules": r".*self_attn\.(q|k)_proj"},
    "one layer": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
    "rslora": {"target_modules": ["o_proj"], "use_rslora": True},
}


@pytest.mark.parametrize("case", PEFT_SETTINGS)
def test_pefts_adapter_here(case: str, tiny: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **PEFT_SETTINGS[case]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = list(range(40, 80))
    model = weights.load(tiny, CPU, torch.float32)
    before = logits_of(model, tokens)
    config = lora.load(model, str(tmp_path / "theirs"))
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0]
    assert relative(logits_of(model, tokens), expected) < 1e-5
    assert relative(before, expected) > 1e-3
    # and what we save of it is the same adapter again
    lora.save(model, config, tmp_path / "ours", str(tiny))
    again = weights.load(tiny, CPU, torch.float32)
    lora.load(again, str(tmp_path / "ours"))
    assert relative(logits_of(again, tokens), expected) < 1e-5
    theirs_again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), tmp_path / "ours")
    with torch.no_grad():
        assert relative(theirs_again(torch.tensor([tokens])).logits[0], expected) < 1e-5


def test_adapter_scale(tiny: Path, tmp_path: Path) -> None:
    model, config = adapted_model(tiny, scale=0.01)
    lora.save(model, config, tmp_path, str(tiny))
    tokens = list(range(30))
    full = weights.load(tiny, CPU, torch.float32)
    for scale in (0.0, 0.5, 1.0):
        lora.load(full, str(tmp_path), scale)
        expected = {name: scale * adapter.delta() for name, adapter in lora.adapted(model).items()}
        assert all(torch.allclose(adapter.delta(), expected[name]) for name, adapter in lora.adapted(full).items())
        lora.detach(full)
    lora.load(full, str(tmp_path), 0.0)
    lora.detach(model)
    assert torch.equal(logits_of(full, tokens), logits_of(model, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_checkpoint_in_transformers(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    import transformers

    model, _ = adapted_model(tiny)
    tokens = list(range(40, 80))
    expected = logits_of(model, tokens)
    lora.merge(model)
    assert relative(logits_of(model, tokens), expected) < 1e-5
    weights.save(model, tiny, tmp_path, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    with torch.no_grad():
        found = theirs.float()(torch.tensor([tokens])).logits[0]
    assert relative(found, expected) < (1e-5 if dtype == torch.float32 else 5e-2)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template
    ours = weights.load(tmp_path, CPU, torch.float32)
    assert relative(logits_of(ours, tokens), found) < (1e-5 if dtype == torch.float32 else 5e-2)


def test_scrambled_weights_have_the_norm_of_the_delta(tiny: Path) -> None:
    model, _ = adapted_model(tiny)
    base = weights.load(tiny, CPU, torch.float32).state_dict()
    norms = {name: adapter.delta().norm() for name, adapter in lora.adapted(model).items()}
    deltas = {name: adapter.delta() for name, adapter in lora.adapted(model).items()}
    lora.scramble(model, seed=3)
    assert not lora.adapted(model)
    for name, norm in norms.items():
        noise = model.state_dict()[f"{name}.weight"] - base[f"{name}.weight"]
        assert abs(noise.norm() / norm - 1) < 1e-4
        assert abs((noise * deltas[name]).sum() / norm**2) < 0.3  # and another direction


WRONG_ADAPTERS = {
    "dora": {"use_dora": True}, "bias": {"bias": "all"}, "modules": {"modules_to_save": ["lm_head"]},
    "ranks": {"rank_pattern": {"q_proj": 2}}, "kind": {"peft_type": "LOHA"}, "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("case", WRONG_ADAPTERS)
def test_adapter_that_would_be_computed_wrongly_is_refused(case: str, tiny: Path, tmp_path: Path) -> None:
    import json

    model, config = adapted_model(tiny)
    lora.save(model, config, tmp_path, str(tiny))
    path = tmp_path / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | WRONG_ADAPTERS[case]))
    with pytest.raises(UserError, match=next(iter(WRONG_ADAPTERS[case]))):
        lora.load(weights.load(tiny, CPU, torch.float32), str(tmp_path))


def test_adapter_of_another_shape_is_refused(tiny: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "wide", hidden_size=64)
    build_model(tmp_path / "deep", num_hidden_layers=3)
    for other in ("wide", "deep"):
        model, config = adapted_model(tmp_path / other)
        lora.save(model, config, tmp_path / f"{other} adapter", other)
        with pytest.raises(UserError, match="another model's"):
            lora.load(weights.load(tiny, CPU, torch.float32), str(tmp_path / f"{other} adapter"))


def test_rank_beyond_the_layer_is_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="rank 17"):
        lora.attach(weights.load(tiny, CPU, torch.float32), lora.LoRAConfig(rank=17))
