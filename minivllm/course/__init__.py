"""The course: finds lessons, writes starter files, grades a learner's files. `minivllm course` is its command line.

A lesson is a folder `lessons/NN_name` with `README.md`, `lesson.py` and `check.py`. The repository has each solution once, as code of
`lesson.py`. `lesson_files.py` removes it from the starter file. `lessons/WRITING.md` describes the format for authors.
"""
