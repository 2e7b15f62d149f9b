"""An HTTP server for one exported model, in OpenAI's dialect of completions. Needs Starlette and uvicorn besides.

    request  ->  app.py          paths, bodies, answers; guard.py in front of it: keys, hosts, the log
             ->  dialect.py      a body becomes texts to write, or an error object
             ->  desk.py         admits them, or says that there is no room; counts, ends
             ->  writer.py       the one thread that runs the model: joins texts, steps, hands out tokens
             ->  answers.py      tokens become choices
    connections.py               sockets, signals, clients that send or read too slowly

Nothing outside this folder imports it but `dmpt_export.requests.serve`.
"""
