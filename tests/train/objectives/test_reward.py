import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider

from gridcap.train.data.vocabulary import EOS, PAD, UNK, Vocabulary
from gridcap.train.objectives.reward import CaptionReward

REFERENCES = [
    [[4, 5, 6, 7, 8], [4, 6, 7]],
    [[4, 9, 10, 11, 12, 13], [9, 10, 4, 4]],
    [[14, 15], [15, 14, 5, 5, 6], [14]],
]
captions = st.lists(st.integers(4, 9), min_size=1, max_size=8)


def batch(captions):
    """Pad token lists, the same number per image, to (B, K, T)."""
    longest = max(len(tokens) for image in captions for tokens in image)
    return np.array([[[*tokens, *[PAD] * (longest + 1 - len(tokens))] for tokens in image] for image in captions])


def text(tokens):
    return " ".join(map(str, tokens))


def by_pycocoevalcap(references, candidates):
    """Return CIDEr-D and BLEU-4 of one candidate per image, without further tokenization."""
    truth = {i: [text(caption) for caption in image] for i, image in enumerate(references)}
    ours = {i: [text(caption)] for i, caption in enumerate(candidates)}
    return Cider().compute_score(truth, ours)[1], np.array(Bleu(4).compute_score(truth, ours, verbose=0)[1][3])


@given(st.lists(st.tuples(captions, st.booleans(), st.lists(captions, min_size=1, max_size=4)), min_size=2, max_size=5))
def test_reward_is_ciderd_and_bleu4_including_eos(examples):
    candidates = [[*caption, *[EOS] * ended] for caption, ended, _ in examples]
    references = [image for *_, image in examples]
    cider, bleu = by_pycocoevalcap([[[*c, EOS] for c in image] for image in references], candidates)
    images, tokens = range(len(examples)), batch([[c] for c in candidates])
    rewards = CaptionReward(references)(images, tokens)
    assert rewards.dtype == np.float32
    assert rewards.shape == (len(examples), 1)
    assert rewards[:, 0] == pytest.approx(cider, abs=1e-5)
    assert CaptionReward(references, 0.5)(images, tokens)[:, 0] == pytest.approx(cider + 0.5 * bleu, abs=1e-5)


@pytest.mark.parametrize("bleu_weight", [0, 2.0])
def test_captions_are_scored_against_their_own_image(bleu_weight):
    reward = CaptionReward(REFERENCES, bleu_weight)
    right = [REFERENCES[2][1], REFERENCES[0][0], REFERENCES[2][0]]
    images, captions = [2, 0, 2], [[[*c, EOS], [4, 8, EOS]] for c in right]
    together = reward(np.array(images), batch(captions))
    assert together.shape == (3, 2)
    for b, image in enumerate(images):
        for k in range(2):
            alone = reward([image], batch([[captions[b][k]]]))
            assert together[b, k] == pytest.approx(alone.item(), rel=1e-5)
    assert (together[:, 0] > together[:, 1]).all()


@pytest.mark.parametrize("bleu_weight", [0, 2.0])
def test_empty_caption_has_zero_reward(bleu_weight):
    tokens = np.array([[[EOS, PAD, PAD], [PAD, PAD, PAD], [4, EOS, PAD]]])
    empty, blank, word = CaptionReward(REFERENCES, bleu_weight)([0], tokens)[0]
    assert empty == blank == 0 < word


def test_tokens_after_eos_are_ignored():
    reward = CaptionReward(REFERENCES, 1.0)
    clean, dirty = reward([0], np.array([[[4, 6, 7, EOS, PAD, PAD], [4, 6, 7, EOS, 8, EOS]]]))[0]
    assert clean == dirty > 0


def test_truncated_caption_has_lower_reward_than_a_complete_one():
    complete, truncated = CaptionReward(REFERENCES)([0], np.array([[[4, 6, 7, EOS], [4, 6, 7, PAD]]]))[0]
    early = CaptionReward(REFERENCES)([0], np.array([[[4, 5, 6, EOS]]])).item()
    unfinished = CaptionReward(REFERENCES)([0], np.array([[[4, 5, 6, PAD]]])).item()
    assert complete > truncated
    assert early < complete
    assert abs(early - unfinished) < complete - truncated, "EOS in the wrong position is not rewarded"


class TestBuild:
    @pytest.fixture
    def data(self, train_data):
        return train_data

    def test_references_are_the_encoded_captions(self, data):
        vocabulary = Vocabulary.build(text for captions in data.captions for text in captions)
        coded = [[vocabulary.encode(text, 99)[1:-1] for text in captions] for captions in data.captions]
        tokens = np.array([[[*coded[i][0], EOS, PAD] for i in range(5)]]).reshape(5, 1, -1)
        built = CaptionReward.build(data, vocabulary, 0.5)(range(5), tokens)
        assert built == pytest.approx(CaptionReward(coded, 0.5)(range(5), tokens))
        assert (built > 1).all()

    def test_out_of_vocabulary_words_never_match_but_count(self, data):
        whole = Vocabulary.build(text for captions in data.captions for text in captions)
        small = Vocabulary([word for word in whole.tokens if word not in ("green", "square")])
        at = next(i for i, captions in enumerate(data.captions) if len(captions) == 3 and "green" in captions[0])
        rewards = {
            vocabulary: CaptionReward.build(data, vocabulary, 1.0)(
                [at], np.array([[vocabulary.encode("one that is here", 9)[1:]]])
            )
            for vocabulary in (whole, small)
        }
        assert rewards[small].item() == pytest.approx(rewards[whole].item())
        assert rewards[small].item() > 0.5
        a = small.encode("a", 1)[1]
        red = next(i for i, captions in enumerate(data.captions) if captions == ("a red square",))
        fewer = Vocabulary([word for word in small.tokens if word != "red"])
        assert CaptionReward.build(data, fewer, 0.0)([red], np.array([[[a, UNK, UNK, EOS]]])).item() == 0

    def test_long_references_are_not_truncated(self, new_store, tmp_path):
        from gridcap.common.captions.records import ImageRecord
        from gridcap.train.data.captioned import CaptionedImages

        long = " ".join(f"w{i}" for i in range(60))
        store = new_store(tmp_path / "s.h5", np.zeros((2, 2, 2, 8), np.float16), [1, 2])
        records = [ImageRecord(1, "001.jpg", (long,)), ImageRecord(2, "002.jpg", ("other",))]
        data = CaptionedImages.join(store, records, tmp_path / "x.json")
        vocabulary = Vocabulary.build([long, "other"])
        tokens = np.array([[vocabulary.encode(long, 99)[1:]]])
        assert CaptionReward.build(data, vocabulary, 0.0)([0], tokens).item() == pytest.approx(10)
