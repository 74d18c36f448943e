"""The dispatcher ops, one module a family. Importing this registers them all."""

from . import additive_attention as additive_attention
from . import attention as attention
from . import cross_entropy as cross_entropy
from . import embedding as embedding
from . import feed_forward as feed_forward
from . import layer_norm as layer_norm
from . import linear_cross_entropy as linear_cross_entropy
from . import recurrent as recurrent
from . import recurrent_bidirectional as recurrent_bidirectional
from . import recurrent_cell as recurrent_cell
from . import rotary_embedding as rotary_embedding
from . import sample as sample
from . import softmax as softmax
