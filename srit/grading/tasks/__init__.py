"""What can be asked of a student, one module a task.

    check(row, where)           InputError for a ground truth that the task cannot hold exactly
    extract(text, row)          the completion's answer, flexible and strict; None where it says nothing
    equal(answer, row) -> bool  whether it is the ground truth
    show(answer) -> str         the answer as rows and reports show it

The instruction of its prompt stands in `INSTRUCTIONS` of srit/text/prompts.py, its name in `TASKS` of
srit/grading/judge.py.
"""
