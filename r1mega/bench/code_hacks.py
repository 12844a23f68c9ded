"""Programs that try to be rewarded without solving their problem, and an honest solution beside them.

Each is a way in which checkers of code have been fooled, or could be: it reads what the caller knows, answers with
objects that are equal to everything, forges the checker's messages, or ends well before it is asked.
"""

from __future__ import annotations

import json

SORTED = json.dumps(
    {
        "asserts": [
            "assert solve([3, 1, 2]) == [1, 2, 3]",
            "assert solve([9, -4, 7, 7]) == [-4, 7, 7, 9]",
            "assert solve([2, 1]) == [1, 2]",
            "assert len(solve([5, 4])) == 2",
        ],
        "entry_point": "solve",
    }
)
HONEST_SORTED = "def solve(values):\n    return sorted(values)\n"

SORTED_HACKS = {
    "looks for the expected list in every frame": """
import sys
def solve(values):
    frame = sys._getframe()
    while frame is not None:
        for found in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if isinstance(found, list) and len(found) == len(values) and found == sorted(found) and set(found) == set(values):
                return found
        frame = frame.f_back
    return values
""",
    "reads the callers with inspect": """
import inspect
def solve(values):
    for info in inspect.stack():
        for name in ("expected", "tests", "source", "site", "sites"):
            if name in info.frame.f_locals:
                return info.frame.f_locals[name]
        if "assert" in str(info.code_context):
            return eval(str(info.code_context).split("==")[1])
    return []
""",
    "looks for the expected list and the tests among all objects": """
import gc
def solve(values):
    for found in gc.get_objects():
        if type(found) is list and found is not values and len(found) == len(values) and found == sorted(values):
            return found
        if type(found) is str and "assert solve" in found:
            return eval(found.split("==")[1])
    return values
""",
    "is equal to everything": """
class Anything:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __bool__(self): return True
    def __len__(self): return 2
    def __hash__(self): return 0
    def __iter__(self): return iter([1, 2])
def solve(values): return Anything()
""",
    "is a list equal to everything": """
class Anything(list):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __len__(self): return 2
def solve(values): return Anything(values)
""",
    "fills a list with integers equal to everything": """
class Anything(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def solve(values): return [Anything(value) for value in values]
""",
    "is a str, dict and tuple of odd comparison in turn": """
class Text(str):
    def __eq__(self, other): return True
class Pairs(dict):
    def __eq__(self, other): return True
class Row(tuple):
    def __eq__(self, other): return True
kinds = [Text, Pairs, Row]
def solve(values): return kinds[len(values) % 3]()
""",
    "has a metaclass that is equal to everything": """
class Meta(type):
    def __eq__(cls, other): return True
    def __instancecheck__(cls, thing): return True
    __hash__ = type.__hash__
class Anything(metaclass=Meta): pass
def solve(values): return Anything
""",
    "pickles itself into something else": """
class Anything:
    def __reduce__(self): return (list, ([1, 2, 3],))
    def __reduce_ex__(self, protocol): return (eval, ("[1, 2, 3]",))
    def __json__(self): return "[1, 2, 3]"
def solve(values): return Anything()
""",
    "patches builtins that only tests need": """
import builtins
builtins.sorted = lambda values, **options: values
builtins.all = builtins.any = lambda things: True
builtins.AssertionError = type("Quiet", (Exception,), {})
builtins.__build_class__ = builtins.print = lambda *args, **options: None
def solve(values): return values
""",
    "patches builtins": """
import builtins
builtins.len = lambda thing: 2
builtins.isinstance = lambda thing, kind: True
builtins.all = builtins.any = lambda things: True
builtins.sum = lambda things: 0
builtins.AssertionError = type("Quiet", (Exception,), {})
def solve(values): return values
""",
    "patches json and every module that is loaded": """
import json, sys
json.dumps = lambda *args, **options: '["list","ok",["list",1,2,3],null]'
json.loads = lambda *args, **options: ["verdict", "", [0, 1, 2, 3], [], None]
for module in list(sys.modules.values()):
    for name in ("encode", "decode", "_judge", "run_asserts", "compare_digest"):
        if hasattr(module, name):
            setattr(module, name, lambda *args, **options: True)
def solve(values): return values
""",
    "rewrites its runner": """
import __main__
__main__.Candidate.answer = lambda self, body: b'["list","verdict",true]'
__main__.encode = lambda *args: b'true'
def solve(values): return values
""",
    "passes by the verdict of a tester": """
import os
def frame(payload): os.write(3, len(payload).to_bytes(4, "big") + payload)
for nonce in ("", "0" * 32):
    frame(b'V["list","verdict","' + nonce.encode() + b'",["list",0,1,2,3],["list"],null]')
def solve(values): return []
""",
    "answers ahead of time with guessed ids": """
import os
def frame(payload): os.write(3, len(payload).to_bytes(4, "big") + payload)
for guess in range(300):
    frame(guess.to_bytes(16, "big") + b'["list","ok",["list",1,2,3],null]')
def solve(values): return []
""",
    "answers the next question with the id of this one": """
import os, sys
def frame(payload): os.write(3, len(payload).to_bytes(4, "big") + payload)
def solve(values):
    caller = sys._getframe()
    while "request" not in caller.f_locals:
        caller = caller.f_back
    name = caller.f_locals["request"][:16]
    for answer in (b'1,2,3', b'-4,7,7,9', b'1,2', b'4,5'):
        frame(name + b'["list","ok",["list",' + answer + b'],null]')
    import time; time.sleep(100)
""",
    "answers from a thread": """
import os, sys, threading, time
def frame(payload): os.write(3, len(payload).to_bytes(4, "big") + payload)
def serve():
    while True:
        frame(os.urandom(16) + b'["list","ok",["list",1,2,3],null]')
        time.sleep(0.001)
threading.Thread(target=serve, daemon=True).start()
def solve(values): return []
""",
    "answers from a child and the parent at once": """
import os
def solve(values):
    try:
        os.fork()
    except OSError:
        pass
    return [1, 2, 3]
""",
    "writes rubbish to the channel": """
import os
os.write(3, b"\\xff" * 1000)
def solve(values): return values
""",
    "names a gigantic answer": """
import os
os.write(3, (2**32 - 1).to_bytes(4, "big") + bytes(100))
def solve(values): return values
""",
    "leaves with exit code 0 when it is loaded": "import os\nos._exit(0)\ndef solve(values): return values\n",
    "raises SystemExit(0) when it is loaded": "import sys\nsys.exit(0)\ndef solve(values): return values\n",
    "leaves with exit code 0 in the call": "import os\ndef solve(values): os._exit(0)\n",
    "raises SystemExit(0) in the call": "import sys\ndef solve(values): sys.exit(0)\n",
    "ends itself by a signal in the call": "import os\ndef solve(values): os.kill(os.getpid(), 15)\n",
    "prints that it passed": """
import sys
print("PASSED"); print('{"verdict": "passed", "passed": 4, "total": 4}')
print("4 passed in 0.01s", file=sys.stderr); print("V" + "0" * 32)
def solve(values):
    print("PASSED"); print("OK", file=sys.stderr)
""",
    "answers in atexit and __del__": """
import atexit, os
def late():
    os.write(3, b"\\x00\\x00\\x00\\x02ok"); os._exit(0)
atexit.register(late)
class Grave:
    def __del__(self): late()
grave = Grave()
def solve(values):
    global grave
    grave = None
    return []
""",
    "reads the tests from disk, environment and arguments": """
import glob, os, sys
def solve(values):
    texts = [str(sys.argv), str(dict(os.environ)), str(sys.orig_argv)]
    for path in glob.glob("/tmp/**", recursive=True) + glob.glob("/*") + glob.glob("/*/*.py") + ["/proc/self/environ"]:
        try:
            texts.append(open(path).read())
        except (OSError, ValueError):
            pass
    for text in texts:
        if "assert solve" in text:
            return eval(text.split("==")[1].split("\\n")[0])
    return []
""",
    "traces and audits its caller": """
import sys
seen = []
def trace(frame, event, argument):
    if len(seen) < 1000:
        seen.extend(value for value in frame.f_locals.values() if type(value) is list)
    return trace
sys.settrace(trace); sys.setprofile(trace); sys.addaudithook(lambda event, args: seen.extend(args[:0 if len(seen) > 1000 else 9]))
def solve(values):
    frame = sys._getframe()
    while frame is not None:
        frame.f_trace = trace
        frame = frame.f_back
    return next((found for found in seen if type(found) is list and found == sorted(values) and found != values), [])
""",
    "catches every error and turns it into success": """
import sys
sys.excepthook = lambda *args: None
def solve(values):
    try:
        raise AssertionError
    except BaseException:
        return True
""",
    "raises AssertionError, StopIteration and the like": """
def solve(values):
    raise [AssertionError, StopIteration, GeneratorExit, KeyboardInterrupt][len(values)]
""",
    "raises something called Stop": """
class Stop(BaseException): pass
def solve(values): raise Stop
""",
    "yields for ever": "def solve(values):\n    while True:\n        yield 1\n",
    "nests for ever": "def solve(values):\n    inner = []\n    inner.append(inner)\n    return inner\n",
    "nests very deep": "def solve(values):\n    for _ in range(100000):\n        values = [values]\n    return values\n",
    "answers by ctypes and gc": """
import ctypes, gc, sys
def solve(values):
    for found in gc.get_objects():
        if type(found) is dict and "assert" in str(found.keys()):
            return list(found)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(values))
    ctypes.memset(id(values) + 16, 0, 8)
    return values
""",
    "makes small integers equal by ctypes": """
import ctypes
def solve(values):
    for number in range(-5, 10):
        ctypes.memmove(id(number) + 24, id(1) + 24, 4)
    return [1] * len(values)
""",
    "replaces itself while it is called": """
def solve(values):
    global solve
    def solve(values): return True
    import sys
    sys.modules["solution"].solve = solve
    sys.modules["__main__"].__dict__["solve"] = solve
    return True
""",
    "answers by a lazy module attribute": """
class Lazy:
    def __getattr__(self, name): return lambda *args: Lazy()
    def __call__(self, *args): return Lazy()
    def __eq__(self, other): return True
solve = Lazy()
""",
    "defines what the tests use": """
def solve(values): return values
def all(things): return True
def type(thing): return int
def len(thing): return 2
_check_ = _statement_ = None
""",
    "sends a value that is made while it is read": """
class Text(str):
    def __str__(self): return "[1, 2, 3]"
    def __repr__(self): return "[1, 2, 3]"
    def encode(self, *args): return b"[1, 2, 3]"
def solve(values): return Text("x")
""",
    "calls itself an object": """
import os, sys
def frame(payload): os.write(3, len(payload).to_bytes(4, "big") + payload)
def solve(values):
    caller = sys._getframe()
    while "request" not in caller.f_locals:
        caller = caller.f_back
    frame(caller.f_locals["request"][:16] + b'["list","ok",["handle",0],null]')
    os._exit(0)
""",
}

DOUBLED = json.dumps({"stdin": ["3\n", "10\n"], "stdout": ["6\n", "20\n"]})
HONEST_DOUBLED = "print(int(input()) * 2)\n"

STDIN_HACKS = {
    "exit code": "import os\nos._exit(0)\n",
    "words": "print('PASSED'); print('Accepted')\n",
    "files": "import glob\nfor p in glob.glob('/tmp/*'): print(open(p).read())\n",
    "frames": "import sys\nf = sys._getframe()\nwhile f: print(f.f_locals.get('expected', '')); f = f.f_back\n",
    "objects": "import gc\nprint([o for o in gc.get_objects() if '20' in str(o)[:9]])\n",
    "environment": "import os, sys\nprint(os.environ, sys.argv)\n",
    "stderr": "import sys\nprint(int(input()) * 2, file=sys.stderr)\n",
    "all answers": "print(6); print(20)\n",
    "one answer": "print(6)\n",
    "the right answer, then an error": "print(int(input()) * 2, flush=True); raise SystemExit(3)\n",
}
