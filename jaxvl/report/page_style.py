"""The style sheet of report.html. Colours stay apart for colour-blind readers, on light and on dark ground."""

STYLE = """
:root{--bg:#fbfbfd;--card:#fff;--ink:#1b1f27;--soft:#667085;--line:#e4e7ec;--right:#067647;--wrong:#b42318;
--c0:#0b63ce;--c1:#d9480f;--c2:#0f8a6d;--c3:#8e3fc4;--c4:#b08800;--c5:#c2255c;--c6:#5b6472;--c7:#3e7cb1;--c8:#7a4a21;
--c9:#b9a7d6;--c10:#2f3542}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--card:#1a1f28;--ink:#e7eaf0;--soft:#98a2b3;--line:#2d3440;
--right:#4ccf96;
--wrong:#ff8a7a;--c0:#6cb2ff;--c1:#ff9a5c;--c2:#4fd1b1;--c3:#c99bff;--c4:#e6c34a;--c5:#ff8fb8;--c6:#9aa4b2;
--c7:#8cc4e8;--c8:#cf9f72;--c9:#6f5a99;--c10:#d5dae3}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:27px;margin:0 0 6px}h2{font-size:19px;margin:0 0 12px}h3{font-size:15px;margin:18px 0 8px}
section,header{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:20px 22px;
margin-bottom:18px}
.facts{color:var(--soft);display:flex;flex-wrap:wrap;gap:2px 20px;overflow-wrap:anywhere}.facts em{font-style:normal;
opacity:.75}
.tiles{display:flex;flex-wrap:wrap;gap:12px 36px;margin:16px 0 4px}.tiles b{display:block;font-size:25px;
line-height:1.2}
.tiles span,p,small{color:var(--soft)}p{margin:6px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:22px}
.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,290px),1fr));margin-top:26px}
figure{margin:0}figcaption{font-weight:600}svg{display:block;width:100%;height:auto}
svg text{fill:var(--soft);font-size:12px;font-family:inherit}svg .unit{font-size:11px}
.grid{stroke:var(--line)}.axis{stroke:var(--soft)}.strip{fill:transparent}.strip:hover{fill:var(--ink);opacity:.08}
.line{fill:none;stroke-width:2;stroke:var(--c);stroke-linejoin:round}.faint{opacity:.32;stroke-width:1.2}
.dot,.area{fill:var(--c)}.legend{display:flex;flex-wrap:wrap;gap:0 16px;color:var(--soft);font-size:13px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;background:var(--c);margin-right:6px}
.swatch{display:inline-block;width:26px;height:8px;margin-right:6px;vertical-align:middle}.bar{height:34px;
margin-bottom:8px}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.c6{--c:var(--c6)}
.c7{--c:var(--c7)}.c8{--c:var(--c8)}.c9{--c:var(--c9)}
.c10{--c:var(--c10)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{padding:4px 22px 4px 0;text-align:right;border-bottom:1px solid var(--line)}th{color:var(--soft);
font-weight:500}
th:first-child,td:first-child{text-align:left;overflow-wrap:break-word}
.query{display:flex;gap:18px;padding:12px 0;border-top:1px solid var(--line);align-items:flex-start}
.asked{flex:0 0 150px;font-weight:600;overflow-wrap:anywhere}.hits{display:flex;flex-wrap:wrap;gap:10px}
.hit{width:132px;border:2px solid var(--line);border-radius:9px;padding:7px;overflow-wrap:anywhere;font-size:13px;
line-height:1.35}
.hit small{display:block;margin-top:5px}.right{border-color:var(--right)}.wrong{border-color:var(--wrong);
border-style:dashed}
.right b{color:var(--right);font-size:16px}.wrong b{color:var(--wrong);font-size:16px}.answer{border-style:dotted}
img{display:block;min-width:72px;max-width:112px;max-height:112px;border-radius:5px;background:#fff}q{quotes:none;
display:-webkit-box;-webkit-line-clamp:7;-webkit-box-orient:vertical;overflow:hidden}
.tables{display:flex;flex-wrap:wrap;gap:12px 60px}
a{color:var(--c0)}pre{overflow-x:auto;font-size:13px}footer{color:var(--soft);padding:0 22px}summary{cursor:pointer}
@media(max-width:640px){.query{flex-direction:column}.asked{flex:none}}
"""
