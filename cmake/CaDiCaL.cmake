# Finds, checks and compiles CaDiCaL 3.0.0 (MIT, https://github.com/arminbiere/cadical) as the static target `cadical`.
#
# Sources are looked for in this order, and every archive must have the SHA-256 below:
#   1. CLUE_CADICAL_SOURCE, a folder or an archive given by the user;
#   2. cadical-3.0.0.tar.gz beside pyproject.toml (release source distributions carry it);
#   3. the copy that an earlier build left in the user's cache folder;
#   4. the upstream release;
#   5. the source distribution of python-sat, which carries the identical archive, through pip;
#   6. an error that says what to do.
set(CLUE_CADICAL_SOURCE "" CACHE PATH "Folder or archive with the sources of CaDiCaL 3.0.0")

set(_version 3.0.0)
set(_sha256 282b1c9422fde8631cb721b86450ae94df4e8de0545c17a69a301aaa4bf92fcf)
set(_name "cadical-${_version}.tar.gz")
set(_url "https://github.com/arminbiere/cadical/archive/refs/tags/rel-${_version}.tar.gz")
set(_work "${CMAKE_CURRENT_BINARY_DIR}/cadical")

# True in `result` when `archive` exists and is the release.
function(_clue_is_release archive result)
  set(${result} FALSE PARENT_SCOPE)
  if(EXISTS "${archive}" AND NOT IS_DIRECTORY "${archive}")
    file(SHA256 "${archive}" _found)
    if(_found STREQUAL "${_sha256}")
      set(${result} TRUE PARENT_SCOPE)
    endif()
  endif()
endfunction()

# Puts the release archive at `destination` out of a source distribution of python-sat, if pip can get one.
function(_clue_from_package_index destination)
  if(WIN32)
    return()
  endif()
  set(_folder "${_work}/pip")
  foreach(_pin "1.9.dev22=cb36d48ae636f959c2cc8b85543e9175e7ab70a11a6593815bdf048a0761188a"
               "1.9.dev17=826e9ef8a8086f5139c05eb89aaa05ebfa72f8a622cd7be429d10a2b1cbb1955")
    string(REPLACE "=" ";" _pin "${_pin}")
    list(GET _pin 0 _release)
    list(GET _pin 1 _hash)
    file(REMOVE_RECURSE "${_folder}")
    file(WRITE "${_folder}/requirements.txt" "python-sat==${_release} --hash=sha256:${_hash}\n")
    message(STATUS "CaDiCaL: trying python-sat ${_release} from the package index")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --disable-pip-version-check --no-input --no-deps
              --no-binary :all: --require-hashes -r "${_folder}/requirements.txt" -d "${_folder}"
      RESULT_VARIABLE _status OUTPUT_QUIET ERROR_QUIET TIMEOUT 120)
    file(GLOB _sdist "${_folder}/*.tar.gz")
    if(_status EQUAL 0 AND _sdist)
      file(ARCHIVE_EXTRACT INPUT "${_sdist}" DESTINATION "${_folder}" PATTERNS "*/solvers/cadical300.tar.gz")
      file(GLOB _inner "${_folder}/*/solvers/cadical300.tar.gz")
      _clue_is_release("${_inner}" _good)
      if(_good)
        file(COPY_FILE "${_inner}" "${destination}")
        break()
      endif()
    endif()
  endforeach()
  file(REMOVE_RECURSE "${_folder}")
endfunction()

# Sets `result` to a verified archive, or fails with the remedy.
function(_clue_find_archive result)
  set(_beside "${CMAKE_CURRENT_SOURCE_DIR}/${_name}")
  if(EXISTS "${_beside}")
    _clue_is_release("${_beside}" _good)
    if(NOT _good)
      message(FATAL_ERROR "${_beside} is not CaDiCaL ${_version} (its SHA-256 must be ${_sha256}); delete it.")
    endif()
    set(${result} "${_beside}" PARENT_SCOPE)
    return()
  endif()

  if(DEFINED ENV{CLUE_CACHE})
    set(_cache "$ENV{CLUE_CACHE}")
  elseif(DEFINED ENV{XDG_CACHE_HOME})
    set(_cache "$ENV{XDG_CACHE_HOME}/clue")
  else()
    set(_cache "$ENV{HOME}/.cache/clue")
  endif()
  _clue_is_release("${_cache}/${_name}" _good)
  if(_good)
    set(${result} "${_cache}/${_name}" PARENT_SCOPE)
    return()
  endif()

  set(_download "${_work}/${_name}")
  _clue_is_release("${_download}" _good)
  if(NOT _good)
    message(STATUS "CaDiCaL: trying ${_url}")
    file(DOWNLOAD "${_url}" "${_download}" STATUS _status INACTIVITY_TIMEOUT 15)
    _clue_is_release("${_download}" _good)
  endif()
  if(NOT _good)
    file(REMOVE "${_download}")
    _clue_from_package_index("${_download}")
    _clue_is_release("${_download}" _good)
  endif()
  if(NOT _good)
    message(FATAL_ERROR "CaDiCaL ${_version} could not be downloaded. Fetch ${_url} on a machine with a network and "
                        "build with: pip install . -C cmake.define.CLUE_CADICAL_SOURCE=/path/to/rel-${_version}.tar.gz")
  endif()
  # Kept for the next build; a cache folder that cannot be written is no reason to fail.
  execute_process(COMMAND "${CMAKE_COMMAND}" -E make_directory "${_cache}" OUTPUT_QUIET ERROR_QUIET)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E copy "${_download}" "${_cache}/${_name}" OUTPUT_QUIET ERROR_QUIET)
  set(${result} "${_download}" PARENT_SCOPE)
endfunction()

if(CLUE_CADICAL_SOURCE AND IS_DIRECTORY "${CLUE_CADICAL_SOURCE}")
  set(_root "${CLUE_CADICAL_SOURCE}")
else()
  if(CLUE_CADICAL_SOURCE)
    _clue_is_release("${CLUE_CADICAL_SOURCE}" _good)
    if(NOT _good)
      message(FATAL_ERROR "CLUE_CADICAL_SOURCE=${CLUE_CADICAL_SOURCE} is neither a folder nor the archive of CaDiCaL "
                          "${_version} with SHA-256 ${_sha256}.")
    endif()
    set(_archive "${CLUE_CADICAL_SOURCE}")
  endif()
  set(_root "${_work}/cadical-rel-${_version}")
  if(CLUE_CADICAL_SOURCE OR NOT EXISTS "${_root}/complete")
    if(NOT CLUE_CADICAL_SOURCE)
      _clue_find_archive(_archive)
    endif()
    message(STATUS "CaDiCaL: ${_archive}")
    file(ARCHIVE_EXTRACT INPUT "${_archive}" DESTINATION "${_work}")
    file(WRITE "${_root}/complete" "${_sha256}\n")
  endif()
endif()
if(NOT EXISTS "${_root}/VERSION")
  message(FATAL_ERROR "${_root} does not hold the sources of CaDiCaL (no VERSION file).")
endif()
file(STRINGS "${_root}/VERSION" _found LIMIT_COUNT 1)
if(NOT _found STREQUAL "${_version}")
  message(FATAL_ERROR "${_root} holds CaDiCaL ${_found}; version ${_version} is needed.")
endif()

file(GLOB _sources "${_root}/src/*.cpp")
list(FILTER _sources EXCLUDE REGEX "/(cadical|mobical|ipasir|ccadical)\\.cpp$")
# Without kitten.c everything links and only the import of the module fails.
add_library(cadical STATIC ${_sources} "${_root}/src/kitten.c")
set_target_properties(cadical PROPERTIES CXX_STANDARD 17 UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE 12)
set_source_files_properties("${_root}/src/walk_full_occs.cpp" "${_root}/src/kitten.c"
                            PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
# NTRACING changes the size of CaDiCaL::Solver, so whoever includes cadical.hpp must see it too.
target_compile_definitions(cadical PUBLIC NTRACING PRIVATE NBUILD NDEBUG NCLOSEFROM)
target_include_directories(cadical SYSTEM PUBLIC "${_root}/src")
# Third party: optimised in every build type, its warnings are not ours, and misuse of its API throws instead of
# aborting the Python process.
target_compile_options(
  cadical PRIVATE -w -O3
                  "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-include \"${CMAKE_CURRENT_SOURCE_DIR}/cmake/cadical_contract.hpp\">")
