"""How a run's report looks."""

STYLE = """
:root { color-scheme: light dark; --ink: #22262b; --faint: #6b7280; --line: #d9dce1; --both: #2f7d5b;
  --learned: #c0392b; --gold: #d97706; --different: #fff4d6; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: #fff; max-width: 1500px; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: .4rem 0; overflow-wrap: anywhere; }
.faint { color: var(--faint); }
.notes { color: var(--learned); }
.runs { display: flex; flex-wrap: wrap; gap: 1.5rem; }
.runs > div { flex: 1 1 30rem; min-width: 0; overflow-x: auto; }
img { max-width: 100%; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; display: block;
  overflow-x: auto; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line); white-space: pre-wrap; }
th:first-child { text-align: left; font-weight: normal; }
tr:first-child th { font-weight: 600; }
.different { background: var(--different); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; line-height: 1.9; max-width: 62rem;
  font-family: ui-monospace, monospace; border-left: 3px solid var(--line); padding-left: .8rem; margin: .8rem 0; }
.text i, .legend i { display: inline-block; height: 1.1em; margin: 0 1px; vertical-align: text-bottom; }
i.both { border-left: 2px solid var(--both); }
i.learned { border-left: 2px dashed var(--learned); }
i.gold { border-left: 3px dotted var(--gold); }
.code { font-size: .72em; color: var(--faint); border: 1px solid var(--line); border-radius: 3px; padding: 0 .15em; }
.legend span { margin-right: 1.5rem; font-family: ui-monospace, monospace; }
summary { cursor: pointer; margin: .5rem 0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --faint: #9aa1ac; --line: #3a3f47; --both: #5ec29a; --learned: #ff7b6b; --gold: #f2b04c;
    --different: #3a3320; }
  body { background: #16181c; }
}
"""
"""The report's CSS."""
