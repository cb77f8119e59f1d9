// Light or dark as chosen before, set before the first paint. Without a choice the system decides.
{
  const chosen = localStorage.getItem("mmchat.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
}
