#pragma once

#define JMOE_EXPORT extern "C" __attribute__((visibility("default")))
