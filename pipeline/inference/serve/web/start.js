// From the first request on: the token, and who is called when.
function login() {
  sessionStorage.removeItem("token");
  $("login").hidden = false;
  $("token").focus();
}

async function begin() {
  try {
    facts = await (await ask("/page/facts")).json();
  } catch (error) {
    $("sizes").textContent = error.status === 401 ? "A token is needed." : "";
    if (error.status === 401 && !sessionStorage.getItem("token")) login();
    else failure(error);
    return;
  }
  problem("");
  $("login").hidden = true;
  about();
  nothing();
  for (const id of ["form", "answers", "elsewhere"]) $(id).hidden = false;
  $("prompt").focus();
  countTokens();
}

$("form").addEventListener("submit", event => { event.preventDefault(); generate(); });
$("stop").addEventListener("click", stop);
$("login").addEventListener("submit", event => {
  event.preventDefault();
  sessionStorage.setItem("token", $("token").value);
  $("token").value = "";
  begin();
});
$("prompt").addEventListener("input", countTokens);
$("tint").addEventListener("change", () => $("answers").classList.toggle("plain", !$("tint").checked));
$("elsewhere").addEventListener("toggle", () => { if ($("elsewhere").open && facts) showCurl(); });
$("form").addEventListener("input", () => { if ($("elsewhere").open && facts) showCurl(); });
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); generate(); }
  else if (event.key === "Escape") { if (!$("tip").hidden) hideTip(); stop(); }
  else move(event);
});
$("answers").addEventListener("mouseover", event => { if (places.has(event.target)) showTip(event.target); });
$("answers").addEventListener("mouseout", event => { if (places.has(event.target)) hideTip(); });
$("answers").addEventListener("focusin", event => { if (places.has(event.target)) settle(event.target); });
$("answers").addEventListener("focusout", hideTip);
addEventListener("scroll", hideTip, { passive: true });
begin();
