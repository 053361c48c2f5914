import numpy as np
import pytest
import torch
from scipy.stats import chi2
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from mezzotint.calibration import sample_windows
from mezzotint.errors import CalibrationError, NonFiniteError

VOCABULARY, EOS = 12, 2


def make(config, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    model = make(config)
    # what a model may bring along; none of it may matter
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.suppress_tokens = [3]
    model.generation_config.temperature = 0.1
    return model


def windows(model, **changes):
    settings = {"samples": 7, "seqlen": 20, "seed": 0, "start_token": 1, "batch_size": 7, **changes}
    return sample_windows(model, **settings)


def next_probabilities(model, prefix):
    with torch.no_grad():
        logits = model(torch.tensor([prefix])).logits[0, -1].double().numpy()
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def assert_drawn_from(counts, probabilities):
    """Pearson's test at 1e-4; classes with fewer than 5 expected are pooled, as its distribution needs."""
    expected = probabilities * counts.sum()
    rare = expected < 5
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    assert statistic < chi2.isf(1e-4, len(counts) - 1), (counts, expected)


def test_windows_are_full_and_go_on_after_eos(llama):
    result = windows(llama, samples=40)
    assert result.tokens.shape == (40, 20)
    assert result.mask is None
    assert result.source == "self"
    assert result.tokens[:, 0].unique().tolist() == [1]
    ends = (result.tokens[:, :-1] == EOS).nonzero()
    assert len(ends) > 5
    # the model's own setting for padding and stopping would repeat one token behind an end
    assert len({result.tokens[row, column + 1].item() for row, column in ends.tolist()}) > 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batch_size_changes_nothing(llama, batch_size):
    # float64: rounding differs between batch sizes by 1e-15, a draw changes about as rarely
    expected, result = windows(llama), windows(llama, batch_size=batch_size)
    torch.testing.assert_close(result.tokens, expected.tokens, rtol=0, atol=0)


def test_seeds_and_the_global_generator(llama):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = windows(llama)
    torch.testing.assert_close(torch.random.get_rng_state(), before, rtol=0, atol=0)
    torch.manual_seed(6)
    torch.testing.assert_close(windows(llama).tokens, first.tokens, rtol=0, atol=0)
    assert not torch.equal(windows(llama, seed=1).tokens, first.tokens)
    assert len({tuple(row) for row in first.tokens.tolist()}) == 7


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_tokens_follow_the_distribution_of_the_model(llama, temperature):
    result = windows(llama, samples=4000, seqlen=3, batch_size=4000, temperature=temperature).tokens
    power = 1 / temperature
    first = next_probabilities(llama, [1]) ** power
    assert_drawn_from(np.bincount(result[:, 1], minlength=VOCABULARY), first / first.sum())
    likeliest = int(first.argmax())
    second = next_probabilities(llama, [1, likeliest]) ** power
    counts = np.bincount(result[result[:, 1] == likeliest, 2], minlength=VOCABULARY)
    assert_drawn_from(counts, second / second.sum())


def test_starts_are_uniform_without_a_start_token(llama):
    result = windows(llama, samples=3000, seqlen=2, batch_size=3000, start_token=None).tokens[:, 0]
    counts = np.bincount(result, minlength=VOCABULARY)
    assert_drawn_from(counts, np.full(VOCABULARY, 1 / VOCABULARY))


def test_suppressed_tokens_never_come(llama):
    result = windows(llama, samples=40, suppress=(EOS, 5)).tokens[:, 1:]
    assert not set(result.flatten().tolist()) & {EOS, 5}


def test_settings_of_the_model_are_put_back(llama):
    own = llama.generation_config
    windows(llama)
    assert llama.generation_config is own

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        windows(llama, progress=stop)
    assert llama.generation_config is own
    assert own.repetition_penalty == 5.0


def test_progress_counts_tokens(llama):
    seen = []
    windows(llama, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert {total for _, total in seen} == {7 * 19}
    assert done == sorted(set(done))
    assert done[-1] == 7 * 19
    assert len(done) == 3 * 19


def test_another_architecture():
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32, eos_token_id=EOS)
    model = make(config)
    expected = windows(model, samples=4)
    assert expected.tokens.shape == (4, 20)
    torch.testing.assert_close(windows(model, samples=4, batch_size=1).tokens, expected.tokens, rtol=0, atol=0)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"seqlen": 1}, {"batch_size": 0}, {"temperature": 0.0}])
def test_sizes_out_of_range(llama, changes):
    with pytest.raises(CalibrationError, match="cannot sample"):
        windows(llama, **changes)


def test_windows_beyond_the_context(llama):
    with pytest.raises(CalibrationError, match=r"the model reads 64\. Set --seqlen 64 or less"):
        windows(llama, seqlen=65)


def test_logits_that_are_not_finite(llama):
    broken = make(llama.config)
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NonFiniteError, match="after 1 sampled tokens"):
        windows(broken)
