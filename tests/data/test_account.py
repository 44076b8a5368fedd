"""The account of damaged samples: of one rank, of all together, over a resume, and when there are too many."""

from copy import deepcopy

import pytest
import torch

from dist_kd.data.account import MOST_NAMED, Account
from dist_kd.data.damage import KINDS
from dist_kd.data.feed import Rows
from dist_kd.errors import DataError
from dist_kd.tracking.keys import KEYS

NOTHING = torch.empty(0)


def rows(epoch, *bad, retries=0):
    """Rows of which samples (number, kind) were bad."""
    found = [(sample, kind, f"sentence on {sample}") for sample, kind in bad]
    return Rows(epoch, 0, NOTHING, NOTHING, NOTHING, NOTHING, found, retries)


def together(accounts):
    """What each rank is told of all."""
    numbers = []
    for account in accounts:
        account.of_all(lambda mine: numbers.append(mine) or mine, lambda mine: [mine])
        account._named = None
    total, all_of_them = sum(numbers), [account.mine for account in accounts]
    answers = [account.of_all(lambda mine: total, lambda mine: all_of_them) for account in accounts]
    assert all(answer == answers[0] for answer in answers)
    return answers[0]


def test_ranks_are_added_and_an_epoch_starts_anew(index):
    one, two = (Account(index, 37, 0.1) for _ in range(2))
    one.add(rows(0, (7, "checksum"), (3, "decode")))
    two.add(rows(0, (20, "checksum"), retries=2))
    found = together([one, two])
    assert found.bad == {"checksum": 2, "decode": 1} and (found.in_epoch, found.retries) == (3, 2)
    assert found.first == {"checksum": "sentence on 7", "decode": "sentence on 3"}
    assert found.named == [
        "sample 3 of train-0000.tar (decode)", "sample 7 of train-0001.tar (checksum)",
        "sample 20 of train-0002.tar (checksum)",
    ]  # fmt: skip
    one.add(rows(1))
    two.add(rows(1, (7, "checksum")))
    found = together([one, two])
    assert found.bad == {"checksum": 3, "decode": 1} and (found.epoch, found.in_epoch) == (1, 1)
    assert len(found.named) == 3  # the same sample again


def test_saved_sums_go_on_from_one_rank(index):
    one = Account(index, 37, 0.1)
    one.add(rows(4, (7, "checksum"), (3, "decode"), retries=1))
    saved = together([one])
    ranks = [Account(index, 37, 0.1) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.load(saved, main=number == 0)
    assert together(ranks) == saved
    before = deepcopy(saved)
    for rank in ranks:
        rank.add(rows(4, (5, "label")))
    found = together(ranks)
    assert found.bad == {"checksum": 1, "decode": 1, "label": 3} and (found.in_epoch, found.retries) == (5, 1)
    assert saved == before  # what was saved tells which kinds are new


def test_names_travel_only_when_there_are_new_ones(index):
    account, gathered = Account(index, 37, 0.1), []

    def of_all():
        return account.of_all(lambda mine: mine, lambda mine: gathered.append(mine) or [mine])

    of_all()
    assert not gathered
    account.add(rows(0, (7, "checksum")))
    assert of_all() == of_all() and len(gathered) == 1


def test_the_limit_is_a_share_and_may_be_reached(index):
    account = Account(index, 37, 0.06)  # 2.22
    account.add(rows(0, (7, "checksum"), (8, "decode")))
    account.check(together([account]))
    account.add(rows(0, (16, "checksum")))
    with pytest.raises(DataError) as error:
        account.check(together([account]))
    for words in (
        "3 of 37 samples of `x`", "share `0.06`", "checksum 2, decode 1", "sample 8 of train-0001.tar (decode)",
        f"dist-kd verify {index.folder}", "--max-bad-fraction 0.0811",
    ):  # fmt: skip
        assert words in str(error.value)
    assert "\n" not in str(error.value) and error.value.alike
    Account(index, 37, 0.0811).check(together([account]))  # what the sentence offers is enough
    with pytest.raises(DataError, match="5 of 37"):
        Account(index, 37, 0.1).check(together([account]), seen=5)  # what ranks agreed on before an epoch's end


def test_a_share_may_be_reached_however_it_is_rounded(index):
    assert Account(index, 100, 0.29).limit == 29  # as a float: 28.999999999999996
    assert Account(index, 247, 0.012).limit == 2 and Account(index, 37, 0).limit == 0


def test_a_long_list_is_cut(index):
    account = Account(index, 37, 0.0)
    account.add(rows(0, *((sample, "decode") for sample in range(MOST_NAMED + 2))))
    with pytest.raises(DataError, match=r"sample 19 of train-0002.tar \(decode\), and others\);") as error:
        account.check(together([account]))
    assert "sample 20 " not in str(error.value)


def test_each_kind_has_a_metric():
    assert {f"data/bad/{kind}" for kind in KINDS} == {key for key in KEYS if key.startswith("data/bad/")}
