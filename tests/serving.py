"Servers that tests start."
import threading


def serve(server):
    "Serve in the background; `shutdown` then takes no half second, as it would by default."
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
