# SPDX-License-Identifier: Apache-2.0

"""Replaces addresses, and names that users and administrators have chosen."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import ipaddress
import json
import os
import re
from typing import Iterator

import kuryr_break0

#: Candidates for addresses, MAC addresses and container ids.
_ADDRESS = re.compile(
    r'\b\d{1,3}(?:\.\d{1,3}){3}\b'
    r'|(?<![\w:])[0-9A-Fa-f]*:[0-9A-Fa-f:]*:[0-9A-Fa-f.]*(?![\w:])'
    r'|\b[0-9a-f]{12,64}\b'
    # nft(8) prints addresses in hexadecimal in bitwise expressions.
    r'|\b0x[0-9a-f]{9,}\b|(?<=,32 )0x[0-9a-f]+\b')
#: A MAC address. In a bridge id, ip(8) prints it without leading zeros.
_MAC = re.compile(r'(?:[0-9A-Fa-f]{1,2}:){5}[0-9A-Fa-f]{1,2}')
#: Candidates for names of several words, longest first: the name of a host
#: with its domain comes before the name without its domain.
_NAMES = tuple(map(re.compile, (r'[\w.-]+', r'[A-Za-z0-9.-]+',
                                r'[A-Za-z0-9-]+')))
#: Shorter names, and common names, are not searched for, because any text may
#: contain them as words.
_SHORTEST = 4
_COMMON_NAMES = ('default', 'kube-system', 'kube-public', 'kube-node-lease')
#: Texts that administrators choose: comments and log prefixes of rules,
#: aliases of interfaces, and log prefixes in the kernel's log.
_FREE = re.compile(
    r'(\b(?:comment|prefix) )(\\".*?\\"|"(?:[^"\\]|\\.)*"'
    r'|(?:(?<=--comment )|(?<=-prefix ))\S+)'
    r'|(?m:^(\s+(?:alias|altname) )(?!kuryr-break0 ledger )(.+)$)'
    r'|(?m:^(\[[^]]*\] )(.+?)(?=IN=\S* OUT=))')
#: A word, or an earlier replacement.
_WORD = re.compile(r'<(?:name|address|mac|id|text)-[0-9a-f]{8}>|\w+(?:-+\w+)*')
#: Words that are never names.
_KNOWN = re.compile(r"""
    .{1,2}                                        # too short
    | _*[0-9_-]+                                  # numbers, with units
      (?:[num]?s|[hdm]|min|sec|[KMGT]?i?[Bb](?:it|ps|ytes)?|[KMG]|x|th)?
    | 0x[0-9a-f]+ | [0-9-]+T[0-9]+Z?              # flags, times
    | (?:python|cpython-)[0-9]+ | [0-9-]+(?:cloud-)?(?:amd64|arm64|generic)
    | (?:kuryr-)?(?:break0-)?                     # interfaces
      (?:break|br|bond|docker|dummy|en[ops]|eth|if|ifb|tap|tun|veth|virbr|vlan|
      wg|wlan|wlp)[0-9][0-9a-fnps]*(?:-[0-9]+)?
    | KUBE(?:-[A-Z]+)+(?:-[A-Z0-9]{16})?          # chains
    | DOCKER(?:-[A-Z]+|-[A-Z]+-STAGE-\d)*
    """, re.VERBOSE)
_PACKAGES = ('kuryr_kubernetes', 'os_vif')


class Redactor:
    """Replaces addresses and names by digests: equal texts, equal digests.

    A word is kept only if it is not a known name of this node, and appears in
    this package, in Kuryr, or in the output of common programs
    (``words.txt``). Therefore unknown names, such as the names of chains and
    of deleted pods, are replaced too.

    :param names: the known names of this node
    """

    def __init__(self, names: set[str]) -> None:
        # Without a salt, a reader could compute the digests of all addresses
        # and compare them with the digests in the text.
        self._salt = os.urandom(16)
        self._names = {
            each for each in names - {*_COMMON_NAMES}
            if len(each) >= _SHORTEST and not _KNOWN.fullmatch(each)}

    def redact(self, text: str) -> str:
        """Return a text without names and addresses."""
        text = _FREE.sub(self._free, text)
        for name in self._names:
            if not _NAMES[0].fullmatch(name):  # it has unusual characters
                for form in (name, json.dumps(name)[1:-1]):
                    text = text.replace(form, self._digest('name', name))
        for words in _NAMES:
            text = words.sub(self._name, text)
        return _WORD.sub(self._word, _ADDRESS.sub(self._address, text))

    def _free(self, match: re.Match[str]) -> str:
        before, text = (each for each in match.groups() if each is not None)
        return before + self._digest('text', text.strip('\\" '))

    def _name(self, match: re.Match[str]) -> str:
        name = match[0].rstrip('.-')
        if name not in self._names:
            return match[0]
        return self._digest('name', name) + match[0][len(name):]

    def _word(self, match: re.Match[str]) -> str:
        word = match[0]
        if (word.startswith('<') or _KNOWN.fullmatch(word)
                or word.lower() in _vocabulary()):
            return word
        return self._digest('name', word)

    def _address(self, match: re.Match[str]) -> str:
        text = match[0]
        if _MAC.fullmatch(text):
            return self._digest('mac', ':'.join(
                octet.zfill(2) for octet in text.lower().split(':')))
        if not set(text) & set('.:'):
            return self._digest('id', text)
        try:
            return self._digest('address', str(ipaddress.ip_address(text)))
        except ValueError:
            return text  # such as a time of day

    def _digest(self, kind: str, text: str) -> str:
        return '<%s-%s>' % (kind, hashlib.blake2b(
            os.fsencode(text), key=self._salt, digest_size=4).hexdigest())


@functools.lru_cache(maxsize=None)
def _vocabulary() -> frozenset[str]:
    """Return all words of this package and Kuryr, and names of sysctls."""
    words: set[str] = set()
    for path in _sources():
        with contextlib.suppress(OSError), open(
                path, errors='replace') as file:
            words.update(match[0].lower()
                         for match in _WORD.finditer(file.read()))
    for place in 'ipv4', 'ipv4/conf/all', 'ipv6/conf/all':
        with contextlib.suppress(OSError):
            words.update(os.listdir('/proc/sys/net/' + place))
    return frozenset(words)


def _sources() -> Iterator[str]:
    places = list(kuryr_break0.__path__)
    for package in _PACKAGES:
        spec = importlib.util.find_spec(package)  # does not import it
        places += spec and spec.submodule_search_locations or []
    for place in places:
        for directory, below, names in os.walk(place):
            below[:] = sorted({*below} - {'tests', '__pycache__'})
            yield from (os.path.join(directory, name) for name in names
                        if name.endswith(('.py', '.txt')))
