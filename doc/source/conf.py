# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#      http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Configuration of Sphinx."""

import os
import re
import sys

sys.path.insert(0, os.path.join(os.path.dirname(__file__), '_ext'))

extensions = [
    'sphinx.ext.autodoc',
    'oslo_config.sphinxconfiggen',
    'oslo_config.sphinxext',
    'sphinx_copybutton',
    'command_line',
    'findings',
    'modules',
]

project = 'kuryr-break0'
copyright = 'kuryr-break0 developers. Apache License, Version 2.0'

exclude_patterns = []
# Most literal blocks are the output of a command.
highlight_language = 'none'
# Keep the two hyphens of options in descriptions of commands.
smartquotes = False

# Copy the commands of a block, without prompts and outputs.
copybutton_prompt_text = r'\w*[#$] '
copybutton_prompt_is_regexp = True
copybutton_line_continuation_character = '\\'

# Not openstackdocstheme: its pages link to the site, the search and the bug
# tracker of OpenStack, and OpenStack does not govern this project.
html_theme = 'furo'
html_title = 'kuryr-break0'
html_show_sphinx = False

# Written while the documentation is built.
config_generator_config_file = [
    ('../../etc/kuryr-break0-config-generator.conf',
     'configuration/_static/kuryr-break0'),
]

man_pages = [
    ('cli/kuryr-break0', 'kuryr-break0',
     'enable traffic between a host and its macvlan containers', '', 8),
]


def _link_pages(app, relative_path, parent_docname, source):
    """Link the page of an included file instead of the file."""
    source[0] = re.sub(
        r'`[\w.]+\s+<(?:doc/source/contributor/)?(\w+)\.rst>`_',
        lambda link: ':doc:`%s`' % link[1].lower(), source[0])


def setup(app):
    app.connect('include-read', _link_pages)
