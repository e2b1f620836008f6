"""C++ programs."""

from collections.abc import Sequence

from megatron_ft.evaluation.problems import Problem

HEADERS = """\
#include<stdlib.h>
#include<algorithm>
#include<cmath>
#include<math.h>
#include<numeric>
#include<stdio.h>
#include<vector>
#include<set>
#include<map>
#include<queue>
#include<stack>
#include<list>
#include<deque>
#include<boost/any.hpp>
#include<string>
#include<climits>
#include<cstring>
#include<iostream>
#include<sstream>
#include<fstream>"""
NAMESPACE = "using namespace std;"


def faithful(problem: Problem, answer: str, earlier: Sequence[str]) -> str:
    """The answer before `int main`, after the headers that answers may use."""
    answer = answer.partition("int main")[0]
    return f"{NAMESPACE}\n{HEADERS}\n{answer}".strip()


def clean(problem: Problem, answer: str) -> str:
    """The answer after the headers; the namespace is opened once it is declared."""
    return f"{HEADERS}\n{NAMESPACE}\n{answer}".strip()


def proving(test: str, nonce: str) -> str:
    """The tests, whose `main` prints the nonce before its last brace."""
    before, brace, after = test.rpartition("}")
    print_nonce = f'std::printf("\\n{nonce}\\n"); std::fflush(stdout);'
    return f"#include<cstdio>\n{before}\n    {print_nonce}\n{brace}{after}"
