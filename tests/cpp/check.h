// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdio.h>
#include <stdlib.h>

// An assertion that stays in optimised builds and says where and, after the condition, what: CHECK(a == b, "unit %d", unit).
#define CHECK(condition, ...)                                        \
  do {                                                               \
    if (!(condition)) {                                              \
      fprintf(stderr, "%s:%d: %s:", __FILE__, __LINE__, #condition); \
      fprintf(stderr, " " __VA_ARGS__);                              \
      fputc('\n', stderr);                                           \
      exit(1);                                                       \
    }                                                                \
  } while (0)
