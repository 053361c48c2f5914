import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


def byte_tokenizer(begin=None, special=SPECIAL, **settings):
    """One token a byte, after the special ones; BOS in front of each text if ``begin`` names it."""
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if begin is not None:
        template = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, special.index(begin))])
        tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """As of a chat model: EOS ends a turn, documents were separated by <|endoftext|>, no BOS."""
    tokenizer = byte_tokenizer(bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def llama_tokenizer():
    """As of a Llama: BOS before each text."""
    return byte_tokenizer("<s>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def plain_tokenizer():
    """EOS, and nothing else."""
    return byte_tokenizer(special=("</s>",), eos_token="</s>")


@pytest.fixture(scope="session")
def bare_tokenizer():
    """No special tokens at all."""
    return byte_tokenizer(special=())
