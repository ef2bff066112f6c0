"""Small random towers in the place of those that the demo downloads."""

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from published import transformers_text, transformers_vision

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def write_towers(folder):
    """Writes an image and a text tower of the depths of the real ones, with a vocabulary of letters."""
    transformers_vision(
        folder / "vision", "ViTModel", num_hidden_layers=12, image_size=28, patch_size=14
    )
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:()-'"
    words = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    transformers_text(
        folder / "text",
        "BertModel",
        num_hidden_layers=6,
        vocab_size=len(words),
        max_position_embeddings=64,
        pad_token_id=0,
    )
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "text" / "tokenizer.json"))
