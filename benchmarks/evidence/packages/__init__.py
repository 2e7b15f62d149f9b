"""One small program for each package that opens the standard layout; each imports nothing of this project.

    PROGRAM REQUEST.json > ANSWER.json

Request: folder, prompts, new_tokens, beams. Answer: version, prompt_ids, alone and batch (new ids of each prompt, by
itself and in a padded batch), beams_alone and beams_batch (null where the package has none), seconds a token, alone.
"""
