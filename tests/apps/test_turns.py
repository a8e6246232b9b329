"""Who is served when, for any order in which people come, come back and leave."""

import threading
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imgdit.apps.demo.turns import Full, Turns

PEOPLE = "abcd"
EVENTS = st.lists(st.tuples(st.sampled_from(["come", "done", "leave"]), st.sampled_from(PEOPLE)), max_size=60)


class Standing:
    """A place in line, held open from outside its context."""

    def __init__(self, turns, person):
        self.person, self.stack = person, ExitStack()
        self.place = self.stack.enter_context(turns.line(person))


@settings(deadline=None, max_examples=200)
@given(EVENTS)
def test_nobody_is_served_twice_while_another_waits(events):
    turns, standing, log = Turns(64), [], []

    def note():
        """Who is served now, once; nobody waits while nobody is served."""
        served = [s for s in standing if turns.ahead(s.place, 0) == 0]
        assert len(served) == (1 if standing else 0)
        if served and ("served", served[0]) not in log:
            log.append(("served", served[0]))
        return served

    for what, person in events:
        if what == "come":
            standing.append(Standing(turns, person))
            log.append(("came", standing[-1]))
        else:
            served = note()
            mine = [s for s in standing if s.person == person and s not in served]
            going = served[:1] if what == "done" else mine[-1:]
            for one in going:
                standing.remove(one)
                one.stack.close()
        note()
    for i, (what, one) in enumerate(log):
        if what == "served":
            before = [o for w, o in log[:i] if w == "served" and o.person == one.person]
            since = log.index(("served", before[-1])) if before else -1
            since = max(since, log.index(("came", one)))
            others = [o.person for w, o in log[since + 1 : i] if w == "served" and o is not one]
            assert all(others.count(p) <= 1 for p in PEOPLE), others
    for one in standing:
        one.stack.close()
    assert not turns._waiting and turns._served is None


def test_how_many_go_before():
    turns = Turns(9)
    with ExitStack() as stack:
        places = [stack.enter_context(turns.line(person)) for person in "aaabbc"]
        # a is served; then the round is a, b, c, a, b
        assert [turns.ahead(place, 0) for place in places] == [0, 1, 4, 2, 5, 3]


def test_what_is_full_says_so():
    turns = Turns(1)
    with turns.line("a"), turns.line("b"):
        with pytest.raises(Full, match="1 requests are waiting already; try again"):
            with turns.line("c"):
                pass
    with turns.line("c") as place:
        assert turns.ahead(place, 0) == 0


def test_who_waits_is_woken():
    turns, served = Turns(9), []

    def ask(person):
        with turns.line(person) as place:
            assert turns.ahead(place) == 0
            served.append(person)

    with turns.line("first"):
        threads = [threading.Thread(target=ask, args=(person,)) for person in "xyz"]
        for thread in threads:
            thread.start()
        assert not served
    for thread in threads:
        thread.join(10)
    assert sorted(served) == ["x", "y", "z"]
