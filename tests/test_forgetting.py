"""`benchmarks/forgetting.py`: the machinery, not the claim."""

from benchmarks.forgetting import run


def test_students_are_measured_on_both_tasks_with_and_without_general_rows():
    found = run(seed=0, share=0.4, steps=1, teacher_steps=2)
    assert list(found) == ["before", "fact book alone", "with 40% general rows"]
    for measured in found.values():
        assert measured.keys() == {"fact book", "reading"}
        assert all(0 <= value <= 1 for value in measured.values())
