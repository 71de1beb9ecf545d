"""The page in the browser: the whole job on one's own machine, with Gradio (`pip install 'personalize[studio]'`).

    server      start: the address, the folder, the application;  guard: who may use it
    folder      the only place where files are read and written
    jobs        one job at a time, for all pages
    actions     buttons as command lines, carried out on the one model in memory
    page        the tabs and the line above them;  parts: what several tabs are made of
    learn, edit, photo, drag, files   a tab each
    learn_words, learning, learn_result   a training as a command line, as it runs, and as it is shown
    edit_pictures                 what the tab Edit shows
    viewing                       pictures as a browser shows them
    canvas.*    the picture with points and masks, in the browser;  studio.css: how it looks

Imports: io, embedded, models, formats, adapters, sampling, evaluation, editing, training, cli.
"""
