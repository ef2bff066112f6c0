complete -c bridgetower -a '(
  set -l words (commandline -opc)
  $words[1] --complete $words[2..] (commandline -ct) 2> /dev/null
)'
