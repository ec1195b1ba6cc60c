// What the engine asks of a model, a group and the options before it builds anything.
#pragma once
#include "muster/engine.h"

namespace muster {

Status check_model(const ModelDesc& model);
Status check_group(const ModelDesc& model, const GroupDesc& group);
Status check_options(const EngineOptions& options);

}  // namespace muster
