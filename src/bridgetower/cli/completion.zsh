#compdef bridgetower
_bridgetower() {
  local -a found=(${(f)"$($words[1] --complete "${(@)words[2,CURRENT]}" 2> /dev/null)"})
  (( $#found )) && compadd -a found || _files
}
compdef _bridgetower bridgetower
